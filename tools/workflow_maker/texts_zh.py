"""The texts of the notes in Chinese, by the English ones. Paragraphs and titles: one for each that a note may have."""

from . import texts

CHINESE = {
    "Qwen-Image": "Qwen-Image",
    "Lightning in 8 steps": "Lightning，8 步",
    "Edit an image, Edit-2511 in 4 steps": "编辑图像，Edit-2511，4 步",
    "Edit with three images, Edit-2511 in 4 steps": "用三张图像编辑，Edit-2511，4 步",
    texts.GGUF_TITLE: "编辑图像，GGUF 的 Edit-2511，4 步",
    "Edit an image, Edit-2509 in 4 steps": "编辑图像，Edit-2509，4 步",
    "Edit with three images, Edit-2509 in 4 steps": "用三张图像编辑，Edit-2509，4 步",
    "Image to image": "图生图",
    "Inpaint": "局部重绘",
    "Outpaint": "扩图",
    "Take an image apart into layers": "把图像拆分成图层",
    "Qwen-Image-2.1-Turbo": "Qwen-Image-2.1-Turbo",
    "Edit an image, Qwen-Image-2.1-Turbo": "编辑图像，Qwen-Image-2.1-Turbo",
    "Qwen-Image-2.1": "Qwen-Image-2.1",
    "Edit with three images, Qwen-Image-2.1": "用三张图像编辑，Qwen-Image-2.1",
    "Remove a background, Qwen-Image-2.1": "去除背景，Qwen-Image-2.1",
    f"Qwen-Image-2.1 {texts.LICENCE_21}": "Qwen-Image-2.1 仅限非商业用途（Qwen Research License）。",
    f"Qwen-Image-2.1-Turbo {texts.LICENCE_21}": "Qwen-Image-2.1-Turbo 仅限非商业用途（Qwen Research License）。",
    texts.PANEL: "*采样*上的面板显示实测值；点击它可查看计划和报告。",
    texts.SIZES: (
        "**尺寸**：1328x1328、1664x928、928x1664、1472x1104、1104x1472、1584x1056、1056x1584。宽和高必须是 16 的倍数"
        "；越小越快。"
    ),
    texts.CFG_1: "**CFG 1** 不使用负面提示词，计算量减半，读取量不变。",
    texts.GRID: "未缩放的 fp8 文件与 Lightning 一起会画出网格：请用缩放过的文件，或 bf16 文件配合*权重格式* int8。",
    texts.BF16_ON_16: (
        "**bf16**：用 {file}（40.9 GB）并把*权重格式*设为 int8，所有块也能常驻显卡。首次加载时量化一次，需几分钟，"
        "硬盘多占 13.6 GB。权重的舍入比 fp8 小：用测试本节点包的微型模型时，Latent 的误差 int8 为 0.010，fp8 为 "
        "0.024。*权重格式*与文件相同（as stored）时，60 个块中 {stay} 个常驻，没有舍入，每步有 {streamed} 个传入显卡。"
    ),
    texts.IMAGE_TO_EDIT: "把图像放入*加载图像*，在提示词中说明要修改什么。",
    texts.IMAGES_TO_EDIT: (
        "把图像放入各个*加载图像*；未连接的输入不计数。在提示词中称它们为 Picture 1、Picture 2、Picture 3。"
    ),
    texts.ONE_GRID: "输出与图像 1 尺寸相同，缩放到约一百万像素，位于同一像素网格：不会偏移或缩放。节点上会显示尺寸。",
    texts.GUIDED_EDIT: (
        "用**引导**代替 Lightning：忽略（Ctrl+B）*加载 LoRA*，在*采样*上把*预设*设为 as set，*调度器*设为 qwen_image，"
        "*步数* 40，*CFG* 4（20 步也很好）。计算量约为二十倍，更贴近提示词。"
    ),
    texts.SCALED_2509: (
        "未缩放的文件（qwen_image_edit_2509_fp8_e4m3fn）只用于有引导的采样：与 Lightning 一起会画出网格。"
    ),
    texts.GGUF_2511: (
        "**GGUF** 在硬盘、内存和总线上的字节数约为 fp8 的三分之二，权重的舍入更大。许多 GGUF 文件缺少 Edit-2511 的标"
        "记，因此由加载节点的*模型版本*指明。计划把每个矩阵按 Q5_K 计算，比 Q4_K_M 的混合格式略多。"
    ),
    texts.MORE_GGUF: (
        "**读取更少**：*qwen-image-edit-2511-Q4_K_M.gguf*（约 13 GB）只有三分之二大；请把*模型版本*设为 "
        f"Qwen-Image-Edit-2511。工作流 *{texts.GGUF_TITLE}* 使用它。"
    ),
    texts.NEW_IMAGE: "把图像放入*加载图像*。在提示词中描述整张新图像，而不只是要改变的部分。",
    texts.DENOISE: (
        "*降噪*是重绘的程度：0.3 改变颜色和质感，0.6 改变风格，0.9 时几乎只保留布局。20 步全部计算；它们是 *步数* / "
        "*降噪* 步的调度中的最后几步。（在 diffusers 中：*strength* 0.6，33 步。）"
    ),
    texts.SCALED: (
        "*缩放图像（像素）* 把图像缩放到 1.68 百万像素（正方形为 1328x1328），边长为模型需要的 16 的倍数（*分辨率步"
        "数*）。1 百万像素更快。"
    ),
    texts.VARIATIONS: "要一次生成多个变体，请在*VAE编码*和*采样*之间加入*复制Latent批次*。每块仍然每步只读一次。",
    texts.PAINT: (
        "把图像放入*加载图像*，右键单击它，选择*用遮罩编辑器打开*，涂抹要改变的部分并保存。在提示词中描述包含新内容的"
        "整张图像。"
    ),
    texts.SOFT_EDGE: (
        "*准备图像和遮罩*把两者缩放到 *megapixels*（1.68 时正方形图像为 1328x1328），把遮罩扩大 *expand* 像素并柔化边"
        "缘（*blur_radius*，不超过 *expand*）：涂抹之处全是新的，并与周围吻合。双击该节点可查看做法。"
    ),
    texts.LAID_OVER: "*合成图像（遮罩）* 把新内容放到原图上：柔化边缘之外，每个像素都与您的文件相同，尺寸也相同。",
    texts.DENOISE_1: "*降噪* 1 不保留遮罩下的内容；0.6 保留其形状。",
    texts.NOTHING_PAINTED: "没有涂抹时，*采样*在加载任何内容之前就会停止，并说明原因。",
    texts.PAD: "把图像放入*加载图像*。*外补画板*设置每边增加多少像素。在提示词中描述扩大后的整张图像。",
    texts.FEATHERING: "*羽化*是新内容融入原图的深度，以原图的像素计。",
    texts.PREPARED: "*准备图像和边缘*把图像和边缘一起缩放到 *megapixels*，并传给*采样*。双击该节点可查看做法。",
    texts.LAID_ROUND: "*合成图像（遮罩）* 把新内容放到原图周围：羽化边缘之内，每个像素都与您的文件相同，尺寸也相同。",
    texts.HALF_A_SIDE: "一次最多扩大约半条边长；要扩得更宽，请分几次进行。",
    texts.LAYERS: "把图像放入*加载图像*。在提示词中描述整张图像，包括被遮住的内容；哪个图层放什么，不由提示词决定。",
    texts.LAYERS_NUMBER: "*layers* 是图层数。保存的第一张是整张图像，随后是各图层，都带透明度。",
    texts.LAYERS_SIZE: (
        "约 640x640 像素（形状任意）的图像效果最好；*megapixels* 把您的图像缩放到这个大小，边长为 32 的倍数。"
    ),
    texts.IMAGE_21: "把图像放入*加载图像*。在提示词中说明要修改什么，并称图像为 *\\<image1>*。",
    texts.IMAGES_21: (
        "把图像放入各个*加载图像*；最后一个输入连接后，*编码编辑提示词*上会出现新的输入，最多十二个（模型训练时为十张"
        "以内）。未连接的输入不计数。在提示词中称它们为 *\\<image1>*、*\\<image2>*、*\\<image3>*。"
    ),
    texts.ONE_GRID_21: (
        "输出与图像 1 尺寸相同，缩放到约一百万像素（*百万像素*；正方形为 1056x1056），位于同一像素网格：不会偏移或缩"
        "放。节点上会显示尺寸。"
    ),
    texts.KEPT_21: "换种子，或对同样的图像换一句提示词，都不会重新计算图像：各步需要的内容会保留在*内存上限*之内。",
    texts.CUT_OUT: "把图像放入*加载图像*。模型会重新生成它，去掉背景并带透明度：这是保存的第一张图像，约一百万像素。",
    texts.OWN_PIXELS: (
        "保存的第二张是您自己的文件，像素和尺寸都不变，模型去掉的地方变为透明：*合并图像Alpha*用的是*解码*的*遮罩*。请检查"
        "两张的边缘：模型移动过的地方，遮罩会不准。"
    ),
    texts.TURBO_STEPS: (
        "**步数**：预设使用 Turbo 自己的 8 步，无引导。用其他调度时，Turbo 的图像较差；*采样*会给出警告。"
    ),
    texts.STEPS_21: (
        "**步数**：25，与 ComfyUI 自带的工作流相同；参考值为 40。没有引导（*CFG* 1）；大于 1 时使用负面提示词，每步约"
        "慢一倍。"
    ),
    texts.SIZES_21: (
        "**尺寸**：32 的倍数，最大 2048x2048 和 2752x1536；越小越快。约一百万像素：1024x1024、1376x768、768x1376。"
    ),
    texts.TRANSPARENT_21: (
        "**透明图像**：把提示词写成 *This is an RGBA format image with transparency. [画面内容]. The image has an "
        "alpha channel and a transparent background.* PNG 会保留透明度；*解码*的*遮罩*也有。"
    ),
}
