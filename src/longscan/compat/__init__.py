"""Other projects' import names: code written for mamba_ssm and causal_conv1d runs on longscan's ops.
