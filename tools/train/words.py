"""The words and facts the corpus is made of."""

from __future__ import annotations


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Return ``a=b | c=d`` as pairs."""
    pairs = []
    for item in text.split("|"):
        left, right = item.split("=")
        pairs.append((left.strip(), right.strip()))
    return tuple(pairs)


def _words(text: str) -> tuple[str, ...]:
    """Return words separated by spaces."""
    return tuple(text.split())


CAPITALS = _pairs(
    """France=Paris | Germany=Berlin | Italy=Rome | Spain=Madrid | Portugal=Lisbon | England=London |
    Ireland=Dublin | Austria=Vienna | Greece=Athens | Poland=Warsaw | Hungary=Budapest | Norway=Oslo |
    Sweden=Stockholm | Denmark=Copenhagen | Finland=Helsinki | Belgium=Brussels | Russia=Moscow | Ukraine=Kyiv |
    Turkey=Ankara | Egypt=Cairo | Kenya=Nairobi | Japan=Tokyo | China=Beijing | India=Delhi | Thailand=Bangkok |
    Vietnam=Hanoi | Iran=Tehran | Iraq=Baghdad | Cuba=Havana | Peru=Lima | Chile=Santiago | Canada=Ottawa |
    Romania=Bucharest | Bulgaria=Sofia | Serbia=Belgrade | Iceland=Reykjavik | Switzerland=Bern | Ghana=Accra"""
)
OPPOSITES = _pairs(
    """hot=cold | big=small | up=down | left=right | black=white | day=night | fast=slow | old=young |
    happy=sad | light=dark | rich=poor | open=closed | high=low | good=bad | hard=soft | wet=dry | full=empty |
    early=late | long=short | strong=weak | near=far | love=hate | war=peace | true=false | first=last |
    clean=dirty | thick=thin | wide=narrow | push=pull | win=lose | begin=end | buy=sell | give=take |
    always=never | inside=outside | above=below | before=after | loud=quiet | sweet=sour | brave=afraid"""
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
COLOURS = _pairs(
    """grass=green | snow=white | blood=red | coal=black | the sky=blue | a banana=yellow | a lemon=yellow |
    milk=white | a tomato=red | a leaf=green | the sea=blue | chocolate=brown | the night=black | salt=white |
    a strawberry=red | a frog=green | an elephant=grey | gold=yellow | a carrot=orange | a cherry=red"""
)
SOUNDS = _pairs(
    """dog=bark | cat=meow | cow=moo | duck=quack | sheep=bleat | lion=roar | bee=buzz | snake=hiss | pig=oink |
    frog=croak | wolf=howl | owl=hoot | horse=neigh | bird=sing | mouse=squeak"""
)
YOUNG = _pairs(
    """dog=puppy | cat=kitten | cow=calf | sheep=lamb | horse=foal | bear=cub | duck=duckling | goat=kid |
    pig=piglet | frog=tadpole | swan=cygnet | hen=chick"""
)
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("animal", _words("dog cat cow horse lion wolf bear mouse sheep goat fox tiger whale rabbit")),
    ("fruit", _words("apple banana cherry lemon pear plum peach grape mango melon")),
    ("colour", _words("red blue green yellow black white brown grey pink purple")),
    ("tool", _words("hammer saw drill axe shovel rake wrench knife")),
    ("number", _words("one two three four five six seven eight nine ten")),
    ("day", DAYS),
    ("month", MONTHS),
    ("metal", _words("gold silver iron copper tin lead zinc steel")),
)
SIZES = _words("ant bee mouse rat rabbit cat fox dog wolf sheep pig lion horse cow elephant whale")
"""Animals from the smallest to the largest."""
REGULAR = _words(
    """
    book pen cup hat ring key door lamp chair bed car boat train road farm park river hill cloud egg bird
    ball doll drum bell flag coin map star cat dog cow lion bear goat banana lemon pear plum hammer saw drill
    shovel king queen girl boy teacher friend doctor window garden letter song plant planet island mountain flower
    desk wall roof coat hand arm head neck finger shirt spoon fork ship tail nail ear"""
)
"""Nouns whose plural adds only an s; none ends in e, because "es" may be one token."""
NOUNS = REGULAR + _words(
    """
    sun moon tree lake leaf rose box shoe bus house stone sand fire ice rain wind bread milk cake soup fish"""
)
"""Words for lists. They include the plurals' nouns, so that a noun whose plural was never asked is still known."""
IRREGULAR = _pairs(
    """man=men | woman=women | child=children | foot=feet | tooth=teeth | mouse=mice | goose=geese | leaf=leaves |
    wolf=wolves | knife=knives | sheep=sheep | city=cities | baby=babies | story=stories | box=boxes | bus=buses |
    fox=foxes | dish=dishes | glass=glasses | peach=peaches"""
)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def with_article(noun: str) -> str:
    """Return ``noun`` with a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
