// Thumbnails of a prompt's images, to be dragged into order. Its value is their paths, in the order that was made.
const list = element.querySelector("ul")
let tiles = [], dragged = null, moved = false

function make(tag, className, label) {
  const made = document.createElement(tag)
  made.className = className
  if (tag === "button") made.type = "button"
  if (label) made.setAttribute("aria-label", label)
  return made
}

function show(focused) {
  list.replaceChildren(...tiles.map((tile, place) => {
    const item = document.createElement("li")
    const handle = make("button", "kg-tile", `Image ${place + 1} of ${tiles.length}: ${tile.name}. Arrow keys move it, Delete removes it.`)
    if (tile.source) {
      const image = new Image()
      Object.assign(image, {src: tile.source, alt: tile.name, draggable: false, title: tile.name})
      handle.append(image)
    } else {
      handle.append(tile.name)
    }
    const number = make("span", "kg-number")
    number.append(place + 1)
    const remove = make("button", "kg-remove", `Remove image ${place + 1}: ${tile.name}`)
    remove.append("\u00d7")
    item.append(handle, number, remove)
    item.classList.toggle("kg-dragged", place === dragged)
    return item
  }))
  if (focused !== undefined) list.querySelectorAll(".kg-tile")[focused]?.focus()
}

function tell() {
  props.value = tiles.map(tile => tile.path)
  trigger("input")
}

function move(from, to) {
  tiles.splice(to, 0, ...tiles.splice(from, 1))
}

function placeOf(node) {
  return [...list.children].indexOf(node?.closest("li"))
}

function remove(place) {
  tiles.splice(place, 1)
  show(Math.min(place, tiles.length - 1))
  tell()
}

list.addEventListener("click", event => {
  if (event.target.closest(".kg-remove")) remove(placeOf(event.target))
})
list.addEventListener("keydown", event => {
  const place = placeOf(event.target), way = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key]
  if (!event.target.closest(".kg-tile") || place < 0) return
  if (event.key === "Delete" || event.key === "Backspace") {
    event.preventDefault()
    remove(place)
  } else if (way && tiles[place + way]) {
    event.preventDefault()
    move(place, place + way)
    show(place + way)
    tell()
  }
})
list.addEventListener("pointerdown", event => {
  if (event.button !== 0 || !event.target.closest(".kg-tile")) return
  dragged = placeOf(event.target)
  moved = false
  list.setPointerCapture(event.pointerId)
})
list.addEventListener("pointermove", event => {
  if (dragged === null) return
  const place = placeOf(document.elementFromPoint(event.clientX, event.clientY))
  if (place < 0 || place === dragged) return
  move(dragged, place)
  dragged = place
  moved = true
  show()
})
for (const end of ["pointerup", "pointercancel"]) {
  list.addEventListener(end, () => {
    if (dragged === null) return
    const place = dragged
    dragged = null
    show(place)
    if (moved) tell()
  })
}
// With images in it gradio takes files on a small button alone: here on all of it
const card = element.closest(".kg-images")
const brings = event => tiles.length && event.dataTransfer.types.includes("Files") && !event.target.closest("button:has(input)")
card?.addEventListener("dragover", event => { if (brings(event)) event.preventDefault() })
card?.addEventListener("drop", event => {
  const input = card.querySelector("input[type=file]")
  if (!brings(event) || !input) return
  event.preventDefault()
  input.files = event.dataTransfer.files
  input.dispatchEvent(new Event("change", {bubbles: true}))
})
watch("images", () => {
  if (dragged !== null) return
  const focused = placeOf(document.activeElement)
  tiles = [...(props.images ?? [])]
  show(focused < 0 ? undefined : focused)
})
