// Lighthouse's figures for report pages: accessibility and best practices, on a desktop's and on a phone's screen.
//
//   mkdir ~/lighthouse && cd ~/lighthouse && npm init --yes && npm install lighthouse@12 playwright-core
//   cp PLAIT/benchmarks/lighthouse.mjs . && node lighthouse.mjs RUN/report/report.html ...
//
// Needs node 20 or newer and a Chromium on the path, or named in PLAIT_CHROMIUM. Prints a line for each page and screen, with the
// audits that are not passed.
import { execSync } from "child_process";
import { readFileSync } from "fs";
import { createServer } from "http";
import lighthouse from "lighthouse";
import { chromium } from "playwright-core";

const files = process.argv.slice(2);
const server = createServer((request, response) => {
  response.setHeader("content-type", "text/html; charset=utf-8");
  response.end(readFileSync(files[Number(request.url.slice(1))]));
}).listen(8977, "127.0.0.1");
const browser = await chromium.launch({
  executablePath: process.env.PLAIT_CHROMIUM ?? execSync("command -v chromium || command -v google-chrome").toString().trim(),
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--remote-debugging-port=9333"],
});
for (const [i, file] of files.entries()) for (const formFactor of ["desktop", "mobile"]) {
  const [mobile, width] = formFactor === "mobile" ? [true, 400] : [false, 1350];
  const { lhr } = await lighthouse(`http://127.0.0.1:8977/${i}`, {
    port: 9333,
    onlyCategories: ["accessibility", "best-practices"],
    formFactor,
    screenEmulation: { mobile, width, height: 900, deviceScaleFactor: 1, disabled: false },
    throttlingMethod: "provided",
  });
  const scores = Object.values(lhr.categories).map(c => `${c.id} ${Math.round(100 * c.score)}`);
  const missed = Object.values(lhr.audits).filter(a => a.score !== null && a.score < 1).map(a => a.id);
  console.log(file, formFactor, scores.join(", "), missed.length ? `(not passed: ${missed.join(", ")})` : "", `[lighthouse ${lhr.lighthouseVersion}]`);
}
await browser.close();
server.close();
