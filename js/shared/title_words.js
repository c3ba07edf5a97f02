// The titles in this pack's workflows in the page's language: of groups, notes and subgraphs. Touches no page.

const STEP_EN = /^Step (\d+): (.+)$/;
const STEP_ZH = /^第 (\d+) 步：(.+)$/;
const STEPS = {
  "Model files": "模型文件",
  "Your image": "您的图像",
  "Your images": "您的多张图像",
  "Your image and its margin": "您的图像和边缘",
  "Your image and mask": "您的图像和遮罩",
  "Prompt and size": "提示词和尺寸",
  "Sample": "采样",
  "What to change": "要修改的内容",
  "What the image shows, and layers": "图像的内容和图层数",
  "What the larger image shows": "扩大后图像的内容",
  "What the new image shows": "新图像的内容",
  "What the whole image shows": "整张图像的内容",
  "The image": "图像",
  "The image as the model drew it": "模型生成的图像",
  "Your own pixels, cut out": "从原图中抠出",
};
const TITLES = {
  "Read me": "说明",
  "Prepare image and layers": "准备图像和图层",
  "Prepare image and margin": "准备图像和边缘",
  "Prepare image and mask": "准备图像和遮罩",
};

const backwards = (words) => Object.fromEntries(Object.entries(words).map(([english, chinese]) => [chinese, english]));
const CHINESE = { step: STEP_EN, steps: STEPS, titles: TITLES, write: (number, what) => `第 ${number} 步：${what}` };
const ENGLISH = {
  step: STEP_ZH,
  steps: backwards(STEPS),
  titles: backwards(TITLES),
  write: (number, what) => `Step ${number}: ${what}`,
};

function said({ step, steps, titles, write }, title) {
  const [, number, what] = step.exec(title ?? "") ?? [];
  return steps[what] ? write(number, steps[what]) : (titles[title] ?? title);
}

/** Give the titles that are ours, in a graph as a file holds it, in Chinese or in English; all others stay. */
export function retitle(graph, chinese) {
  const words = chinese ? CHINESE : ENGLISH;
  const inside = graph.definitions?.subgraphs ?? [];
  for (const each of [graph, ...inside]) {
    for (const group of each.groups ?? []) group.title = said(words, group.title);
    for (const node of each.nodes ?? []) if (node.title) node.title = said(words, node.title);
  }
  for (const subgraph of inside) subgraph.name = said(words, subgraph.name);
}
