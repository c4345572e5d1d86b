"""Pages about runs as a test reads them, and text that would do something on one."""

from html.parser import HTMLParser

from rlp.measure.report import write_report

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [bold red]x[/bold red] [/] {{ 7 * 7 }}"
    " \x1b[31mred\x1b[0m \x1b]0;title\x07 \u202e \x00 :smile:"
)


def page_of(*paths, out):
    write_report(list(paths), out)
    return out.read_text()


class Tags(HTMLParser):
    """Every tag of a page, its attributes, and the text outside style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data
