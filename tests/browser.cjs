// Looks at a page as a person does, and prints as JSON what is seen: node browser.cjs PAGE CHROMIUM
"use strict";
const { chromium } = require("playwright-core");

/** What the viewer shows: text, slice numbers, and values of pixels of the axial slice. */
const look = () => {
  const axial = document.getElementById("axial"), { data, width } = axial.getContext("2d", { willReadFrequently: true })
    .getImageData(0, 0, axial.width, axial.height);
  const at = window.viewer.viewOf(window.viewer.planes[0]), nodule = window.viewer.scan.nodules[0].index;
  const x = Math.floor(((nodule[2] + 0.5 - at.left) / at.width) * width);
  const y = Math.floor(((nodule[1] + 0.5 - at.top) / at.height) * axial.height);
  let coloured = 0;
  for (let i = 0; i < data.length; i += 4) coloured += data[i] - data[i + 2] > 100;
  return {
    status: document.getElementById("status").textContent,
    slices: ["axial", "coronal", "sagittal"].map((name) => document.getElementById(`${name}-number`).textContent),
    nodule: data[4 * (y * width + x)],
    lung: data[4 * (y * width + x + Math.round(width / 12))],
    coloured,
    focus: document.activeElement.id,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    viewer: document.getElementById("viewer").getClientRects().length > 0,
    pictures: [...document.querySelectorAll(".keys img")].filter((image) => image.getClientRects().length && image.naturalWidth).length,
  };
};

async function visit(browser, file, options, steps) {
  const context = await browser.newContext(options), page = await context.newPage(), problems = [];
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("request", (request) => /^(file|data|blob):/.test(request.url()) || problems.push(request.url()));
  const begin = Date.now();
  await page.goto(`file://${file}`);
  const seen = { problems };
  if (options.javaScriptEnabled !== false) {
    await page.waitForFunction(() => document.documentElement.dataset.ready === "yes");
    seen.milliseconds = Date.now() - begin;
  }
  await steps(page, seen);
  await context.close();
  return seen;
}

async function main([file, executablePath]) {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const settled = async (page) => {
    await page.waitForTimeout(400);
    return page.evaluate(look);
  };
  const key = async (page, name) => {
    await page.keyboard.press(name);
    return settled(page);
  };
  const result = {};
  for (const width of [1280, 360]) {
    result[width] = await visit(browser, file, { viewport: { width, height: 760 } }, async (page, seen) => {
      seen.start = await settled(page);
      await page.locator("#axial").hover();
      await page.mouse.wheel(0, 120);
      seen.wheel = await settled(page);
      await page.locator("#coronal").hover();
      await page.mouse.wheel(0, 80);
      seen.coronal = await settled(page);
      await page.locator("#axial").focus();
      for (const name of ["ArrowUp", "PageDown", "Home", "End", "n", "s", "l", "c", "+"]) seen[name] = await key(page, name);
      await page.locator("#axial").click({ position: { x: 20, y: 30 } });
      seen.click = await settled(page);
      const box = await page.locator("#axial").boundingBox();
      await page.mouse.move(box.x + 100, box.y + 100);
      await page.mouse.down();
      for (let i = 0; i < 10; i++) await page.mouse.move(box.x + 100 + i, box.y + 100);
      const dragged = await page.evaluate(() => window.viewer.position[2]);
      await page.mouse.move(box.x + 100, box.y + 100);
      seen.drag = [dragged, await page.evaluate(() => window.viewer.position[2])];
      await page.mouse.up();
      await page.locator("th a[data-nodule]").first().click();
      seen.link = await settled(page);
      await page.emulateMedia({ media: "print" });
      seen.print = await page.evaluate(look);
      const before = seen.problems.length;
      seen.blocked = await page.evaluate(() => fetch("http://127.0.0.1:9/").then(() => false, () => true));
      seen.problems.splice(before); // what the policy says of it
    });
  }
  result.plain = await visit(browser, file, { javaScriptEnabled: false }, async (page, seen) => {
    seen.text = await page.locator("body").innerText();
    seen.viewer = await page.locator("#viewer").isVisible();
    seen.picture = await page.locator(".keys img").first().isVisible();
  });
  await browser.close();
  console.log(JSON.stringify(result));
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
