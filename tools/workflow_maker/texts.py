"""What the notes in the workflows say, but for numbers, which the planner makes (`stated_plans`)."""

GGUF_TITLE = "Edit an image, Edit-2511 from GGUF in 4 steps"
LICENCE_21 = (
    "is for non-commercial use only: [Qwen Research License](https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/"
    "LICENSE)."
)
PANEL = "The panel on *Sample* shows what is measured; click it for the plan and the report."
SIZES = (
    "**Sizes**: 1328x1328, 1664x928, 928x1664, 1472x1104, 1104x1472, 1584x1056, 1056x1584. Width and height must be "
    "multiples of 16; smaller is faster."
)
CFG_1 = "**cfg 1** leaves the negative prompt out and halves the computing, but not the reading."
GRID = (
    "The unscaled fp8 file draws a grid together with Lightning: use the scaled one, or a bf16 file with "
    "*weight_format* int8."
)
BF16_ON_16 = (
    "**bf16**: with {file} (40.9 GB) and *weight_format* int8 all blocks stay on the card too. It is quantized at the "
    "first load: some minutes once, and 13.6 GB more on disk. The weights are rounded less than in fp8: the "
    "miniature's latents were off by 0.010 with int8 and by 0.024 with fp8. With *weight_format* as stored, {stay} of "
    "60 blocks stay, nothing is rounded, and {streamed} pass through the card at every step."
)
IMAGE_TO_EDIT = "Put your image into *Load Image*. In the prompt, say what to change."
IMAGES_TO_EDIT = (
    "Put your images into *Load Image*; inputs that are not connected are not counted. In the prompt, call them "
    "Picture 1, Picture 2, Picture 3."
)
ONE_GRID = (
    "The output has the size of image 1, scaled to about one megapixel, on the same pixel grid: nothing shifts or "
    "zooms. The node shows the sizes."
)
GUIDED_EDIT = (
    "**Guided** instead of Lightning: bypass *Load LoRA*, and on *Sample* choose the preset *as set*, the *scheduler* "
    "qwen_image, 40 *steps* and *cfg* 4 (20 steps work well). That takes about twenty times the computing, and follows "
    "the prompt more closely."
)
SCALED_2509 = (
    "The unscaled file (qwen_image_edit_2509_fp8_e4m3fn) is for guided steps alone: together with Lightning it draws a "
    "grid."
)
GGUF_2511 = (
    "**GGUF** takes two thirds of fp8's bytes on disk, in RAM and on the bus, and rounds the weights more. Many GGUF "
    "files lack Edit-2511's mark, so the loader's *variant* says which model it is. The plan counts every matrix "
    "as Q5_K, a little more than Q4_K_M's mixture takes."
)
MORE_GGUF = (
    "**Less to read**: *qwen-image-edit-2511-Q4_K_M.gguf* (about 13 GB) has two thirds of the bytes; set *variant* to "
    f"Qwen-Image-Edit-2511 for it. The workflow *{GGUF_TITLE}* uses it."
)
NEW_IMAGE = "Put your image into *Load Image*. In the prompt, describe all of the new image, not only what changes."
DENOISE = (
    "*denoise* is how much is made new: 0.3 changes colours and texture, 0.6 the style, and at 0.9 little but the "
    "layout stays. All 20 *steps* are taken; they are the last ones of a schedule of *steps* / *denoise*. (In "
    "diffusers: *strength* 0.6 with 33 steps.)"
)
SCALED = (
    "*Scale Image to Total Pixels* scales the image to 1.68 megapixels (1328x1328 if it is square), with sides in "
    "multiples of 16 (*resolution_steps*), which the model needs. 1 megapixel is faster."
)
VARIATIONS = (
    "For several variations at a time, put *RepeatLatentBatch* between *VAE Encode* and *Sample*. Each block is still "
    "read once per step."
)
PAINT = (
    "Put your image into *Load Image*, right-click it, choose *Open in Mask Editor*, paint over what is to change, "
    "and save. In the prompt, describe the whole image, with the new part in it."
)
SOFT_EDGE = (
    "*Prepare image and mask* scales both to *megapixels* (1.68 is 1328x1328 of a square image), grows the mask by "
    "*expand* pixels and gives it a soft edge (*blur_radius*, not above *expand*): all that you painted is new, and "
    "what is new fits what is around it. Double-click the node to see how."
)
LAID_OVER = (
    "*Image Composite Masked* lays the new part over your image: outside the soft edge every pixel is that of your "
    "file, at your file's size."
)
DENOISE_1 = "*denoise* 1 forgets what was under the mask; 0.6 keeps its shapes."
NOTHING_PAINTED = "With nothing painted, *Sample* stops before anything is loaded."
PAD = (
    "Put your image into *Load Image*. *Pad Image for Outpainting* says how many pixels are added on each side. In the "
    "prompt, describe the whole, larger image."
)
FEATHERING = "*feathering* is how far the new part blends into your image, in pixels of your file."
PREPARED = (
    "*Prepare image and margin* scales both to *megapixels*, of image and margin together, and passes them to "
    "*Sample*. Double-click the node to see how."
)
LAID_ROUND = (
    "*Image Composite Masked* lays the new part around your image: inside the feathered edge every pixel is that of "
    "your file, at its own size."
)
HALF_A_SIDE = "Add at most about half a side at a time; make wider margins in several runs."
LAYERS = (
    "Put your image into *Load Image*. In the prompt, describe the whole image, including what is hidden; the prompt "
    "does not decide what goes into which layer."
)
LAYERS_NUMBER = (
    "*layers* is the number of layers. The first saved image is the whole one, followed by the layers, each with "
    "transparency."
)
LAYERS_SIZE = (
    "Images of about 640x640 px, in any shape, work best; *megapixels* scales yours to that, in steps of 32 px."
)
IMAGE_21 = "Put your image into *Load Image*. In the prompt, say what to change, and call the image *\\<image1>*."
IMAGES_21 = (
    "Put your images into *Load Image*; an input appears after the last connected one, up to twelve (the model was "
    "made for ten). Inputs that are not connected are not counted. In the prompt, call the images *\\<image1>*, "
    "*\\<image2>*, *\\<image3>*."
)
ONE_GRID_21 = (
    "The output has the size of image 1, scaled to about one megapixel (*megapixels*; 1056x1056 if it is square), on "
    "the same pixel grid: nothing shifts or zooms. The node shows the sizes."
)
KEPT_21 = (
    "Another seed, or another instruction for the same images, does not compute the images again: what the steps need "
    "of them is kept within *ram_limit_gb*."
)
CUT_OUT = (
    "Put your image into *Load Image*. The model draws it again without its background, with transparency: this is "
    "the first saved image, of about one megapixel."
)
OWN_PIXELS = (
    "The second is your own file, pixel by pixel at its own size, transparent where the model made it so: *Join Image "
    "with Alpha* uses the *MASK* of *Decode*. Look at the edges of both: where the model moved something, the "
    "mask is off."
)
TURBO_STEPS = (
    "**Steps**: the preset takes Turbo's own 8, without guidance. Turbo makes poor images with another schedule; "
    "*Sample* warns about it."
)
STEPS_21 = (
    "**Steps**: 25, as in ComfyUI's own workflow; the reference takes 40. There is no guidance (*cfg* 1); above 1 the "
    "negative prompt counts, and a step takes about twice as long."
)
SIZES_21 = (
    "**Sizes**: multiples of 32, up to 2048x2048 and 2752x1536; smaller is faster. About a megapixel: 1024x1024, "
    "1376x768, 768x1376."
)
TRANSPARENT_21 = (
    "**Transparent images**: write the prompt as *This is an RGBA format image with transparency. [what it shows]. The "
    "image has an alpha channel and a transparent background.* The PNG keeps the transparency; *MASK* of *Decode* has "
    "it as well."
)
