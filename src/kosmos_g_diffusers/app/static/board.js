// A drawing board: strokes on an image, or on white. Its value is a PNG of the strokes alone, as a data: URI, or "".
const board = element.querySelector("canvas")
const brush = element.querySelector("input")
const pen = board.getContext("2d")
let last = null
let drawn = ""  // the value that is on the board
let coming = props.value  // strokes that belong to the image that comes with them

function fit(width, height) {
  board.width = width
  board.height = height
  const strokes = coming
  coming = drawn = ""
  if (strokes) show(strokes)
  if ((props.value || "") !== (strokes || "")) props.value = strokes || ""
}

function show(strokes) {
  drawn = strokes
  const image = new Image()
  image.onload = () => pen.drawImage(image, 0, 0, board.width, board.height)
  image.src = strokes
}

function setImage() {
  const image = new Image()
  image.onload = () => {
    const [width, height] = [image.naturalWidth, image.naturalHeight]
    const scale = Math.max(1, Math.round(384 / Math.max(width, height)))  // sprites are too small to paint on
    fit(scale * width, scale * height)
    board.style.backgroundImage = `url("${props.image}")`
  }
  if (props.image) {
    image.src = props.image
  } else {
    fit(512, 512)
    board.style.backgroundImage = "none"
  }
}

function place(event) {
  const box = board.getBoundingClientRect()
  const scale = board.width / box.width
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, scale]
}

function paint(event) {
  if (!last) return
  const [x, y, scale] = place(event)
  pen.lineWidth = brush.value * scale
  pen.lineCap = pen.lineJoin = "round"
  pen.beginPath()
  pen.moveTo(...last)
  pen.lineTo(x, y)
  pen.stroke()
  last = [x, y]
}

board.addEventListener("pointerdown", event => {
  board.setPointerCapture(event.pointerId)
  last = place(event).slice(0, 2)
  paint(event)
})
board.addEventListener("pointermove", paint)
for (const end of ["pointerup", "pointercancel"]) {
  board.addEventListener(end, () => {
    if (last) props.value = drawn = board.toDataURL("image/png")
    last = null
  })
}
element.querySelector("button").addEventListener("click", () => {
  coming = ""
  setImage()
})
watch("image", setImage)
watch("value", () => {
  if (props.value === drawn) return
  coming = props.value
  pen.clearRect(0, 0, board.width, board.height)
  if (coming) {
    show(coming)
  } else {
    drawn = ""
  }
})
setImage()
