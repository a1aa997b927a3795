// Keys of the page, its dark theme, and image words that are offered while a prompt is typed.
const find = selector => document.querySelector(selector)

// Dark theme: that of the system until someone chooses
const THEME = "kosmos-g-theme"
const setTheme = theme => document.body.classList.toggle("dark", theme === "dark")
const chosenTheme = () => { try { return localStorage.getItem(THEME) } catch { return null } }
if (chosenTheme()) setTheme(chosenTheme())
document.addEventListener("click", event => {
  if (!event.target.closest("#theme button")) return
  const theme = document.body.classList.contains("dark") ? "light" : "dark"
  setTheme(theme)
  try { localStorage.setItem(THEME, theme) } catch { /* it lasts as long as the page */ }
})

// What gradio leaves to be fixed for screen readers: a button that takes files in another one, named by a key of its texts, and
// empty places that have a label and no role
function nameParts() {
  for (const empty of document.querySelectorAll('.empty[aria-label]:not([role])')) empty.setAttribute("role", "img")
  for (const button of document.querySelectorAll(".icon-button:has(.upload-container)")) {
    if (button.getAttribute("role") === "group") continue
    button.setAttribute("role", "group")
    button.tabIndex = -1
    button.title = "Add files"
    button.setAttribute("aria-label", "Add files")
  }
}
new MutationObserver(nameParts).observe(document.body, {childList: true, subtree: true})

// Keys
const isRunning = () => find('.kg-run[data-state="running"], .kg-run[data-state="waiting"]')
const isOpen = () => find('[role="listbox"], [role="dialog"], #images .preview, #maps-shown .preview') || document.fullscreenElement
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault()
    close()
    // a field tells what was typed when it is left
    const field = document.activeElement
    if (field?.matches("input")) field.blur()
    setTimeout(() => find("#run")?.click(), 50)
  } else if (event.key === "Escape" && !event.defaultPrevented && !isOpen() && isRunning()) {
    find("#cancel")?.click()
  }
}, true)

// Image words
let options = [], current = 0
const area = () => find("#prompt textarea")
const typed = field => field.selectionStart === field.selectionEnd && /<[a-z0-9-]*$/i.exec(field.value.slice(0, field.selectionStart))
const words = () => [...document.querySelectorAll("#prompt-line [data-word]")]

function insert(field, text, from) {
  field.focus()
  field.setRangeText(text, from, field.selectionEnd, "end")
  field.dispatchEvent(new Event("input", {bubbles: true}))
}

function close() {
  find("#kg-offer")?.remove()
  options = []
  area()?.removeAttribute("aria-activedescendant")
  area()?.removeAttribute("aria-controls")
}

function take(place) {
  const field = area(), match = typed(field), text = options[place]?.text
  close()
  if (match && text) insert(field, text, match.index)
}

function mark() {
  find("#kg-offer")?.querySelectorAll("[role=option]").forEach((option, place) => option.setAttribute("aria-selected", place === current))
  area().setAttribute("aria-activedescendant", `kg-offer-${current}`)
}

function offer(field) {
  close()
  const match = typed(field)
  if (!match || !words().length) return
  const known = [{text: "<i>", image: null, title: "an image"}, ...words().map(word => ({text: word.dataset.word, image: word.querySelector("img")}))]
  options = known.filter(({text}) => text.startsWith(match[0].toLowerCase()) && text !== match[0])
  if (!options.length) return
  const box = document.createElement("ul")
  Object.assign(box, {id: "kg-offer", role: "listbox"})
  box.setAttribute("aria-label", "Image words")
  box.append(...options.map(({text, image, title}, place) => {
    const option = document.createElement("li")
    Object.assign(option, {id: `kg-offer-${place}`, role: "option"})
    if (image) option.append(image.cloneNode())
    option.append(text, title ? `: ${title}` : "")
    option.addEventListener("pointerdown", event => { event.preventDefault(); take(place) })
    return option
  }))
  const place = field.getBoundingClientRect()
  Object.assign(box.style, {left: `${place.left + scrollX}px`, top: `${place.bottom + scrollY}px`})
  document.body.append(box)  // nothing there cuts it off
  field.setAttribute("aria-controls", "kg-offer")
  current = 0
  mark()
}

document.addEventListener("input", event => { if (event.target === area()) offer(event.target) })
document.addEventListener("focusout", event => { if (event.target === area()) close() })
document.addEventListener("keydown", event => {
  if (event.target !== area() || !options.length || event.ctrlKey || event.metaKey) return
  const way = {ArrowDown: 1, ArrowUp: -1}[event.key]
  if (way) {
    current = (current + way + options.length) % options.length
    mark()
  } else if (event.key === "Enter" || event.key === "Tab") {
    take(current)
  } else if (event.key === "Escape") {
    close()
  } else {
    return
  }
  event.preventDefault()
  event.stopPropagation()
}, true)
document.addEventListener("click", event => {
  const word = event.target.closest("#prompt-line [data-word]")
  if (word && area()) insert(area(), word.dataset.word, area().selectionStart)
})
