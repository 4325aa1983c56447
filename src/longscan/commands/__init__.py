"""One file per verb: parse, call the room that does it, print."""
