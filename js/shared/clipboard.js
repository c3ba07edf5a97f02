// Text into the clipboard, or as near to it as a page may come. Touches nothing by itself.

/** Into the clipboard; where the page may not (another machine's, without https), what `rangeOf()` gives is selected.
 *  Whether it is there. */
export async function copyText(text, rangeOf) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().removeAllRanges();
    getSelection().addRange(rangeOf());
    return false;
  }
}
