// Buttons of examples: the value is the number of the one that was clicked.
element.addEventListener("click", event => {
  const button = event.target.closest("[data-example]")
  if (!button) return
  props.value = button.dataset.example
  trigger("click")
})
