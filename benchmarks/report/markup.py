"""HTML made of parts: what is not markup already is escaped, whatever it comes from."""

import html


class Html(str):
    """Text that is markup already; any other text is escaped where it is put into markup."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """The value as markup: itself if it is some, else its text escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def joined(*parts: object) -> Html:
    """The parts one after another; None is left out."""
    return Html("".join(escaped(part) for part in parts if part is not None))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """An element with escaped children and attributes.

    Args:
        name: of the element.
        children: markup, or text that is escaped; None is left out.
        attributes: None and False are left out, True stands alone; a trailing underscore is dropped
            and others become hyphens (``class_``, ``data_v``).
    """
    text = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in ("meta", "img", "br"):
        return Html(f"<{name}{text}>")
    return Html(f"<{name}{text}>{joined(*children)}</{name}>")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value), quote=True)}"'


def paragraph(*children: object, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *children, class_=class_)


def bullets(items: list[object]) -> Html:
    """A list of items; nothing where there are none."""
    return element("ul", *[element("li", item) for item in items]) if items else Html()


def folded(summary: object, *children: object, opened: bool = False) -> Html:
    """Something that a click shows."""
    return element("details", element("summary", summary), *children, open=opened)


def anchor(text: str) -> str:
    """A text as the id of an element: letters, digits and hyphens."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).strip("-")
