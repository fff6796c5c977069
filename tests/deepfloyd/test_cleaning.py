"""Cleaned captions against diffusers', on odd ones and on mixtures of these."""

import random
import warnings

import pytest

from tests.deepfloyd.networks import diffusers  # isort: skip  # it mends torchvision

from imagen_jax.text import cleaning

PARTS = """
A red cube on top of a blue sphere|Eine Katze, die auf dem Dach sitzt!
<b>bold</b> &amp; <i>italic</i>
https://example.com/a/b?c=d|http://foo.org|www:bar|see example.net/page for more
mail me@example.com
@nickname says hi|<person> walks a dog|日本語のテキスト and english|ㇰㇱ ㈱ ㌀ 㐀 ䷀ 一
dash – em — bar ― wave 〜
`quoted´ «guillemets» “curly” ‘single’|&quot;hello&quot|tom &amp jerry|192.168.0.1 is home
12:30 |3:45   
line\\nbreak|#12 photo|#123456 art|1234567 views|IMG_1234.JPG|my.photo.png rocks
"''""'' many quotes
***AUSVERKAUFT***|#SALE|wait.... what|word . word|this-is-my-cute-cat
this_is_my_cute_dog_too|a-b
jc6640|jc6640vc|6640vc231|j2d1a2a3|free shipping worldwide|worldwide free shipping
Shipping
free download|download free|click for details|click on image|png images|jpg image
page 12 of 30
300x250|10.5х20.3|3×4 grid|word : word|a,b.c/d|one,two|'leading|trailing'|_under|colon:
plus+|semi;
.hidden|"wrapped"|'wrapped'|   spaces   and	tabs |©2020 Company™ ®|¿qué? ¡hola!|naïve café
schÃ¶n
%20encoded%2Btext|a+b+c|{curly} [square] (round)|back\\slash|fore/slash|pipe|tilde~
½ cup ¾|№5|10%
&lt;tag&gt; &#39;apos&#39;|<script>x</script>after|<p>para</p><p>two</p>|unclosed <b
5 > 3 and 2 < 4|emoji 😀🎉
UPPER CASE|MiXeD|Ärger über Öl|Привет мир|مرحبا|हिन्दी|a|.|-|_|'|"|   |
""".strip("\n")  # fmt: skip


def captions() -> list[str]:
    parts = PARTS.replace("\n", "|").split("|")
    mixed = random.Random(0)
    return parts + [" ".join(mixed.sample(parts, mixed.randint(2, 5))) for _ in range(300)]


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_captions_are_cleaned_as_diffusers_does():
    pipe = object.__new__(diffusers.IFPipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = pipe._text_preprocessing(captions(), clean_caption=True)
        found = [cleaning.clean(caption) for caption in captions()]
    different = [trio for trio in zip(captions(), found, wanted, strict=True) if trio[1] != trio[2]]
    assert not different, different[:3]
    assert len(captions()) > 390 and len(set(found)) > 300


def test_without_the_extra_captions_are_lower_case(monkeypatch):
    monkeypatch.setattr(cleaning, "can_clean", lambda: False)
    assert cleaning.clean("  A RED <b>Apple</b> ") == "a red <b>apple</b>"
