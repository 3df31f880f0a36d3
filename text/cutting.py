"""Blocks of bytes cut into records: lines, or the elements of a JSON array.

Every byte is looked at once, however long a record is. Of a record that is too long nothing is
kept; None stands in its place.
"""

import re

SPACE = b" \t\r\n"
OUTSIDE = re.compile(rb'["\[\]{},]')  # what counts outside of a string
BACKSLASH = b"\\"[0]


class Unfinished:
    """A record whose end has not been met yet. Holds at most `longest` bytes."""

    def __init__(self, longest):
        self.longest = longest
        self.parts = []
        self.length = 0

    def add(self, part):
        self.length += len(part)
        if self.length > self.longest:
            self.parts.clear()
        elif part:
            self.parts.append(part)

    def end(self, part=b""):
        """The whole record with its last part; None where it is too long."""
        self.add(part)
        whole = None
        if self.length <= self.longest:
            whole = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts = []
        self.length = 0
        return whole


class Lines:
    """Lines without their ends."""

    damage = ""  # there is none

    def __init__(self, longest):
        self.line = Unfinished(longest)
        self.longest = longest

    def cut(self, block):
        """The lines that end in the next block."""
        first, *lines = block.split(b"\n")
        if not lines:
            self.line.add(first)
            return []
        tail = lines.pop()
        records = [self.line.end(first)]
        records += [line if len(line) <= self.longest else None for line in lines]
        self.line.add(tail)
        return records

    def last(self):
        """A last line without its end, or none."""
        return [self.line.end()] if self.line.length else []


class Array:
    """The elements of one JSON array, as their bytes; they are only delimited here."""

    damage = ""  # why the file cannot be read any further

    def __init__(self, longest):
        self.element = Unfinished(longest)
        self.begun = False  # was the array's own bracket met?
        self.ended = False
        self.depth = 0  # brackets that are open inside of the element
        self.in_string = False
        self.skip = 0  # bytes of the next block that belong to an escape such as \"

    def cut(self, block):
        """The elements that end in the next block."""
        elements = []
        at = start = 0
        if not self.begun:
            at = start = block.find(b"[") + 1
            self.begun = at > 0
            if not self.begun:
                return []
        at += self.skip
        self.skip = 0
        while not self.ended:
            if self.in_string:
                at = self.behind_string(block, at)
                if at is None:
                    break
            found = OUTSIDE.search(block, at)
            if not found:
                break
            at = found.end()
            if found[0] == b'"':
                self.in_string = True
            elif self.ends_element(found[0]):
                self.append_to(elements, block[start : found.start()])
                start = at
        if self.ended:
            if block[start:].strip(SPACE):
                self.damage = "something stands behind the array's end"
            return elements
        part = block[start:]
        self.element.add(part if self.element.length else part.lstrip(SPACE))
        return elements

    def behind_string(self, block, at):
        """Where the string ends whose middle is at `at`; None where the block ends first."""
        while True:
            quote = block.find(b'"', at)
            end = quote if quote >= 0 else len(block)
            first = end
            while first > at and block[first - 1] == BACKSLASH:
                first -= 1
            escaped = (end - first) % 2
            if quote < 0:
                self.skip = escaped
                return None
            at = quote + 1
            if not escaped:
                self.in_string = False
                return at

    def ends_element(self, mark):
        """Count the brackets; does the element end here?"""
        if mark in b"[{":
            self.depth += 1
        elif self.depth == 0:
            self.ended = mark != b","
            return True
        elif mark != b",":
            self.depth -= 1
        return False

    def append_to(self, elements, part):
        """The element that ends with this part; nothing between two commas is none."""
        if not self.element.length:
            part = part.lstrip(SPACE)
        if self.element.length or part:
            elements.append(self.element.end(part))

    def last(self):
        """Nothing, where the array has ended."""
        if not self.ended:
            self.damage = "the array's end is missing"
        return []
