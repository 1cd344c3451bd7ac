"""Files: storage (.pth, .safetensors, directories), the dialects of tensor names, refusals, hub names, upgrades."""
