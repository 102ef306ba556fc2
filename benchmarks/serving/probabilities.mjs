// Next-token probabilities by llama.cpp. Reads {model, adapters, prompts} on standard input, prints {version, answers}.
//     node probabilities.mjs ROOT     ROOT: the folder in which node-llama-cpp is installed
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const TOP = 5;
// The probabilities are the softmax of the logits: nothing cut off, nothing sharpened.
const SOFTMAX = { temperature: 1, topK: 0, topP: 1, minP: 0 };
const require = createRequire(join(process.argv[2], "package.json"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const { model: modelPath, adapters, prompts } = JSON.parse(readFileSync(0, "utf8"));

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1 });
const model = await llama.loadModel({ modelPath });
const answers = [];
for (const filePath of adapters) {
    let context;
    try {
        const lora = filePath ? { adapters: [{ filePath, scale: 1 }] } : undefined;
        context = await model.createContext({ contextSize: 256, threads: 1, lora });
    } catch (error) {
        answers.push(String(error.message ?? error));
        continue;
    }
    const sequence = context.getSequence();
    const answer = [];
    for (const prompt of prompts) {
        await sequence.clearHistory();
        const last = [prompt.at(-1), { generateNext: { probabilities: true, options: SOFTMAX } }];
        const outputs = await sequence.controlledEvaluate([...prompt.slice(0, -1), last]);
        const next = [...outputs.at(-1).next.probabilities].sort((a, b) => b[1] - a[1]);
        answer.push(next.slice(0, TOP));
    }
    answers.push(answer);
    await context.dispose();
}
console.log(JSON.stringify({ version: `${llama.llamaCppRelease.repo} ${llama.llamaCppRelease.release}`, answers }));
await llama.dispose();
