// The errors that people meet most, in Chinese, by the code that the server sends with its English text. All others are
// shown in English. Touches no page.
import { gib } from "./run_words.js";

const more = (bytes) => (bytes / 2 ** 30 + 0.01).toFixed(2);

const ZH = {
  "plan.sampling_does_not_fit": (v) =>
    `采样至少需要 ${gib(v.need_bytes)} GiB 显存，上限为 ${gib(v.limit_bytes)} GiB。\n\n` +
    `可行的办法：减小图片或批次，不用引导（cfg 设为 1），或把显存上限提高到 ${more(v.need_bytes)} GB 以上。`,
  "plan.sampling_does_not_fit_in_ram": (v) =>
    `采样至少需要 ${gib(v.need_bytes)} GiB 显存和 ${gib(v.need_ram_bytes)} GiB 内存，上限为 ${gib(v.limit_bytes)} GiB 和 ` +
    `${gib(v.limit_ram_bytes)} GiB。\n\n可行的办法：减小图片或批次，不用引导（cfg 设为 1），或提高到显存 ` +
    `${more(v.need_bytes)} GB、内存 ${more(v.need_ram_bytes)} GB 以上。`,
  "plan.prompts_do_not_fit": (v) =>
    `编码 ${v.tokens} 个词元的提示词需要 ${gib(v.need_bytes)} GiB，上限为 ${gib(v.limit_bytes)} GiB。\n\n` +
    `可行的办法：缩短提示词，或把显存上限提高到 ${v.need_gb} GB 以上。`,
  "plan.images_do_not_fit": (v) =>
    `查看 ${v.count} 张图片（${v.tokens} 个词元）需要 ${gib(v.need_bytes)} GiB，上限为 ${gib(v.limit_bytes)} GiB。\n\n` +
    `可行的办法：减少或缩小图片，或把显存上限提高到 ${v.need_gb} GB 以上。`,
  "plan.vae_does_not_fit": (v) =>
    `VAE 处理 ${v.width}x${v.height} 的图片，即使用最小的分块，除权重外还需要 ${gib(v.need_bytes)} GiB；现有 ` +
    `${gib(v.limit_bytes)} GiB。\n\n可行的办法：减小图片，或把显存上限提高 ${more(v.lacking_bytes)} GB。`,
  "plan.wrong_size": (v) =>
    `无法生成 ${v.width}x${v.height} 像素的图片：宽和高必须是 ${v.step} 的倍数。\n\n` +
    `可行的办法：改为 ${v.near_width}x${v.near_height}。`,
  "memory.card_ran_out": (v) =>
    `显存不足：${v.why}。\n\n可行的办法：关闭其他占用显卡的程序，或把 vram_limit_gb 设为小于空闲显存的值，再次运行。`,
  "memory.ram_ran_out": (v) =>
    `内存不足：${v.why}；总共 ${v.total_gib.toFixed(1)} GiB，现在剩余 ${v.free_gib.toFixed(1)} GiB。\n\n` +
    `可行的办法：关闭其他程序，或把 ram_limit_gb 设为小于空闲内存的值，再次运行。`,
  "choice.missing": (v) =>
    `models/${v.kind} 中没有 ${v.choice}。\n\n可行的办法：把文件放到那里并按 R，或选择另一个文件。`,
  "choice.no_pipeline_folder": (v) =>
    `models/diffusers 中没有流水线文件夹 ${v.name}。\n\n可行的办法：把含有 model_index.json 的文件夹放到那里并按 R。`,
  "file.missing": (v) => `${v.file} 不存在。\n\n可行的办法：检查文件名，或重新下载模型。`,
  "file.empty": (v) => `${v.file} 是空文件。\n\n可行的办法：重新下载。`,
  "file.ends_early": (v) => `${v.file} 缺少末尾的 ${v.lacking} 字节：打开之后被修改或截断。\n\n可行的办法：重新下载。`,
  "sampling.empty_mask": () =>
    "噪波遮罩为空：图片不会有任何变化。\n\n可行的办法：右键单击“加载图像”中的图片，选择“用遮罩编辑器打开”并涂抹要改变的部分；" +
    "或去掉设置遮罩的节点。",
  "sampling.wrong_number_of_masks": (v) =>
    `批次有 ${v.count} 张图片，遮罩却有 ${v.masks} 个。\n\n可行的办法：合并遮罩，或生成同样多的图片（RepeatLatentBatch）。`,
  "edit.other_clip": (v) =>
    `clip 是另一个模型的文本编码器；${v.member} 需要 ${v.needed}，例如 ${v.example}。\n\n` +
    `可行的办法：把 variant 设为 auto，或连接加载了 ${v.member} 的加载节点的 clip。`,
  "edit.other_vae": (v) =>
    `vae 属于另一个模型：它有 ${v.found} 个潜空间通道，${v.member} 需要 ${v.needed} 个。\n\n` +
    `可行的办法：连接加载了 ${v.member} 的加载节点的 vae，或加载 ${v.example}。`,
  "vae.other_models_latents": (v) =>
    `这个潜空间图像有 ${v.found} 个通道，而此 VAE 解码 ${v.channels} 个：它们属于不同的模型。\n\n` +
    `可行的办法：使用生成它的模型的 VAE（16 通道：qwen_image_vae.safetensors；64 通道：qwen_image_2.1_vae_bf16.safetensors）。`,
  "plan.steps_of_other_table": (v) =>
    `step_cache 的 ${v.name} 是 ${v.table_steps} 步的表，而本次运行有 ${v.steps} 步。\n\n` +
    `可行的办法：把步数设为 ${v.table_steps}，或把 step_cache 设为 off。`,
};

/** The message of an error, as a page in that language says it: the numbers and the way out stand in it. */
export function messageOf(chinese, { code, values, text }) {
  const own = chinese && ZH[code];
  if (!own) return text;
  return values.input ? `${values.input}：${own(values)}` : own(values);
}
