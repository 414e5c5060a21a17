"""A student as a folder for devices, and what runs it: no torch, only numpy, OpenVINO and tokenizers."""
