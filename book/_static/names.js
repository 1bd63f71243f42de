// What a control shows must be part of what a screen reader calls it. The theme's labels leave the
// shown text out: without a label the text itself is the name.
document.addEventListener("DOMContentLoaded", () => {
  for (const control of document.querySelectorAll("summary[aria-label], .search-button-field")) {
    control.removeAttribute("aria-label");
  }
  for (const icon of document.querySelectorAll(".theme-switch")) {
    icon.removeAttribute("title");
    icon.setAttribute("aria-hidden", "true");
  }
  // A list has items; the role that docutils gives a reference is no longer one of ARIA's.
  for (const reference of document.querySelectorAll(".citation-list > .citation")) {
    reference.setAttribute("role", "listitem");
  }
});
