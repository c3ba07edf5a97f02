"""The prompt templates of Qwen-Image and of its editing models, and how much of them is dropped after encoding."""

# Qwen-Image's prompt template, and how many of its tokens are dropped from the embeddings
# (diffusers pipeline_qwenimage.py: prompt_template_encode, prompt_template_encode_start_idx).
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPT_TEMPLATE_TOKENS = 34
# the same of the editing models (pipeline_qwenimage_edit_plus.py); Edit's own differs in how images stand in it
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT_TEMPLATE_TOKENS = 64
IMAGE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
# the longest prompt that the reference pipelines allow, template not counted
MAX_PROMPT_TOKENS = 1024
