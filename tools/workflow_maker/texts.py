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
    "With Lightning, the unscaled fp8 file draws a grid over the image: use the scaled one, or a bf16 file with "
    "*weight_format* int8."
)
BF16_ON_16 = (
    "**bf16**: with {file} (40.9 GB) and *weight_format* int8, all blocks stay on the card too. The file is quantized "
    "when it is first loaded: that takes some minutes once, and 13.6 GB more on disk. The weights are rounded less "
    "than in fp8: with the tiny model that this pack is tested with, the error of the latents was 0.010 in int8 and "
    "0.024 in fp8. With *weight_format* as stored, {stay} of 60 blocks stay, nothing is rounded, and {streamed} pass "
    "through the card at every step."
)
IMAGE_TO_EDIT = "Put your image into *Load Image*. In the prompt, say what to change."
IMAGES_TO_EDIT = (
    "Put your images into the *Load Image* nodes; inputs that are not connected are not counted. In the prompt, call "
    "the images Picture 1, Picture 2, Picture 3."
)
ONE_GRID = (
    "The output has the size of image 1, scaled to about one megapixel, on the same pixel grid: nothing shifts or "
    "zooms. The node shows the sizes."
)
GUIDED_EDIT = (
    "**Guided** instead of Lightning: bypass *Load LoRA*, and on *Sample* choose the preset *as set*, the *scheduler* "
    "qwen_image, 40 *steps* and *cfg* 4 (20 steps work well). That needs about twenty times the computing, and "
    "follows the prompt more closely."
)
SCALED_2509 = (
    "Use the unscaled file (qwen_image_edit_2509_fp8_e4m3fn) only with guidance: with Lightning it draws a grid over "
    "the image."
)
GGUF_2511 = (
    "**GGUF** takes two thirds of fp8's bytes on disk, in RAM and on the bus, but rounds the weights more. Many GGUF "
    "files lack Edit-2511's mark, so here the loader's *variant* says which model it is. The plan counts every matrix "
    "as Q5_K, which is a little more than Q4_K_M's mixture takes."
)
MORE_GGUF = (
    "**Less to read**: *qwen-image-edit-2511-Q4_K_M.gguf* (about 13 GB) has two thirds of the bytes; set *variant* to "
    f"Qwen-Image-Edit-2511 for it. The workflow *{GGUF_TITLE}* uses it."
)
NEW_IMAGE = "Put your image into *Load Image*. In the prompt, describe all of the new image, not only what changes."
DENOISE = (
    "*denoise* is how much is made new: 0.3 changes colours and texture, 0.6 the style, and at 0.9 little more than "
    "the layout stays. All 20 *steps* are taken; they are the last ones of a schedule of *steps* / *denoise* steps. "
    "(In diffusers: *strength* 0.6 with 33 steps.)"
)
SCALED = (
    "*Scale Image to Total Pixels* scales the image to 1.68 megapixels (1328x1328 if it is square), with sides in "
    "multiples of 16 pixels (*resolution_steps*), which the model needs. 1 megapixel is faster."
)
VARIATIONS = (
    "For several variations at a time, put *RepeatLatentBatch* between *VAE Encode* and *Sample*. Each block is still "
    "read only once per step."
)
PAINT = (
    "Put your image into *Load Image*, right-click it, choose *Open in Mask Editor*, paint over what is to change, "
    "and save. In the prompt, describe the whole image, with the new part in it."
)
SOFT_EDGE = (
    "*Prepare image and mask* scales both to *megapixels* (1.68 makes a square image 1328x1328), grows the mask by "
    "*expand* pixels and gives it a soft edge (*blur_radius*, which should not be above *expand*): all that you "
    "painted is made new, and blends into what is around it. Double-click the node to see how."
)
LAID_OVER = (
    "*Image Composite Masked* lays the new part over your image: outside the soft edge, every pixel is that of your "
    "file, at your file's size."
)
DENOISE_1 = "*denoise* 1 forgets what was under the mask; 0.6 keeps its shapes."
NOTHING_PAINTED = "If nothing is painted, *Sample* stops with a message before anything is loaded."
PAD = (
    "Put your image into *Load Image*. *Pad Image for Outpainting* says how many pixels are added on each side. In the "
    "prompt, describe the whole, larger image."
)
FEATHERING = "*feathering* is how far the new part blends into your image, in pixels of your file."
PREPARED = (
    "*Prepare image and margin* scales the image with its margin to *megapixels*, and passes both to *Sample*. "
    "Double-click the node to see how."
)
LAID_ROUND = (
    "*Image Composite Masked* lays the new part around your image: inside the feathered edge, every pixel is that of "
    "your file, at your file's size."
)
HALF_A_SIDE = "Add at most about half of a side's length at a time; make wider margins in several runs."
LAYERS = (
    "Put your image into *Load Image*. In the prompt, describe the whole image, including what is hidden; the prompt "
    "does not decide what goes into which layer."
)
LAYERS_NUMBER = (
    "*layers* is the number of layers. The first saved image is the whole image; the layers follow, each with "
    "transparency."
)
LAYERS_SIZE = (
    "Images with about the area of 640x640 px, in any shape, work best; *megapixels* scales yours to that, with sides "
    "in multiples of 32 px."
)
IMAGE_21 = "Put your image into *Load Image*. In the prompt, say what to change, and call the image *\\<image1>*."
IMAGES_21 = (
    "Put your images into the *Load Image* nodes; *Encode Edit Prompt* shows another input as soon as the last one is "
    "connected, up to twelve (the model was made for ten). Inputs that are not connected are not counted. In the "
    "prompt, call the images *\\<image1>*, *\\<image2>*, *\\<image3>*."
)
ONE_GRID_21 = (
    "The output has the size of image 1, scaled to about one megapixel (*megapixels*; 1056x1056 if it is square), on "
    "the same pixel grid: nothing shifts or zooms. The node shows the sizes."
)
KEPT_21 = (
    "With another seed, or another instruction for the same images, the images are not computed again: what the steps "
    "need from them is kept, within *ram_limit_gb*."
)
CUT_OUT = (
    "Put your image into *Load Image*. The model draws it again without its background, with transparency: this is "
    "the first saved image, of about one megapixel."
)
OWN_PIXELS = (
    "The second saved image is your own file, pixel by pixel at its own size, transparent where the model made it so: "
    "*Join Image with Alpha* uses the *MASK* of *Decode*. Look at the edges of both: if the model moved something, "
    "the mask does not fit there."
)
TURBO_STEPS = (
    "**Steps**: the preset uses Turbo's own 8 steps, without guidance. With another schedule Turbo makes poor images; "
    "*Sample* warns about that."
)
STEPS_21 = (
    "**Steps**: 25, as in ComfyUI's own workflow; the reference uses 40. There is no guidance (*cfg* 1); with *cfg* "
    "above 1 the negative prompt is used, and a step takes about twice as long."
)
SIZES_21 = (
    "**Sizes**: multiples of 32, up to 2048x2048 and 2752x1536; smaller is faster. About a megapixel: 1024x1024, "
    "1376x768, 768x1376."
)
TRANSPARENT_21 = (
    "**Transparent images**: write the prompt as *This is an RGBA format image with transparency. [what it shows]. "
    "The image has an alpha channel and a transparent background.* The PNG keeps the transparency, and *Decode* also "
    "gives it as *MASK*."
)
