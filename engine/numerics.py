"""Which numbers this engine makes: a version that grows whenever they change. Imports nothing."""

# Grows when the same files, settings and seed make another image than before (beyond what another card, driver or torch
# changes); the changelog says what changed. It stands in every report, so that two reports can be compared.
# 1: 0.1.0 before its release. 2: ComfyUI's positions, and weights as stored, unless a person chooses otherwise.
# 3: LoRA scales that stand in the metadata alone are left out, as ComfyUI leaves them.
# 4: layers on a card compute on weights that ComfyUI quantized as it does, unless a person chooses otherwise.
# 5: those outside the blocks as well.
NUMERICS_VERSION = 5
