"""What no run of ours tells of a machine, in one place: assumed by the forecast, and by the model that checks it.

None of these was measured on a card by us; `python dev.py bench simulate` says what they come to.
"""

# A small kernel's share of a stream: CUDA's launches take 2 to 5 us each on Linux, more under Windows' WDDM.
LAUNCH_SECONDS = 5e-6
# Decoding's kernels wait for the device's memory, and products for its arithmetic: beside each other, products lose
# half of decoding's seconds. 0 would be two that never meet, 1 two that take turns.
DECODE_SHARE = 0.5
# Python and torch take about 10 us for an operator; a block has some 120 and as many shapes to look at.
ISSUE_SECONDS = 0.0025
# Between two steps the sampler waits for the device, computes a few small kernels, and begins again.
STEP_SECONDS = 0.015
# cudaHostRegister walks over 4 KiB pages: about 0.25 s per GB.
LOCK_BYTES = 4e9
# One thread's share of a disk whose full speed takes several reads at a time; SATA gives all to one.
READER_SHARE = 0.7
# Convolutions with few channels, against the large products that `flops` is measured with.
CONVOLUTION_SHARE = 0.5
