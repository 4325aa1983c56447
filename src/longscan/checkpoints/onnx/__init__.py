"""ONNX files of image and video classifiers: the ops in ONNX's terms, and the export."""
