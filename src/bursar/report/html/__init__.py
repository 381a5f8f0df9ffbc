"""Pages for a browser: one file each, nothing fetched, every string escaped. No dependency, no arithmetic.

`markup` escapes and nests elements, `plots` draws SVG, `page` is the report of a step, `notebook` what a cell shows;
`style.css` and `report.js` are what they look like and how they move. The web page takes the same.
"""
