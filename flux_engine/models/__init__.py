"""Networks only: no files, no devices, no prompts. Attribute names are the publishers' checkpoint keys."""
