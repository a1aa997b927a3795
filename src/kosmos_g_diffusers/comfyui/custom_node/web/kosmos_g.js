// Nodes with inputs that grow: those that are connected and one more are shown, up to the number the node declares.
import { app } from "../../scripts/app.js";

const GROWING = { KosmosGPrompt: "image", KosmosGNegative: "image", KosmosGBlend: "conditioning" };

function show(node, prefix, type, most) {
  const numbers = () =>
    (node.inputs ?? [])
      .map((input, slot) => ({ input, slot, number: Number(input.name.match(`^${prefix}(\\d+)$`)?.[1]) }))
      .filter(({ number }) => number > 0);
  const last = Math.max(0, ...numbers().filter(({ input }) => input.link != null).map(({ number }) => number));
  const wanted = Math.min(last + 1, most);
  for (const { slot } of numbers().filter(({ number }) => number > wanted).reverse()) node.removeInput(slot);
  for (let number = numbers().length + 1; number <= wanted; number++) node.addInput(`${prefix}${number}`, type);
}

app.registerExtension({
  name: "kosmos_g.growing_inputs",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const prefix = GROWING[nodeData.name];
    if (!prefix) return;
    const declared = Object.entries(nodeData.input?.optional ?? {}).filter(([name]) => name.startsWith(prefix));
    const [type, most] = [declared[0][1][0], declared.length];
    for (const event of ["onNodeCreated", "onConnectionsChange", "onConfigure"]) {
      const before = nodeType.prototype[event];
      nodeType.prototype[event] = function (...args) {
        const result = before?.apply(this, args);
        // after the graph has set its links
        queueMicrotask(() => show(this, prefix, type, most));
        return result;
      };
    }
  },
});
