"""Whether a caption says left or right, in the languages that most is written in."""
# ruff: noqa: RUF001

import unicodedata

import pytest

from captioning.training.directions import names_a_side

NAMED = {
    "English": ["A man on the left.", "the RIGHTmost dog", "left-handed"],
    "Chinese": ["左边有一只狗", "狗在右侧。", "向右转"],
    "Spanish": ["Un cuadrado a la izquierda.", "el brazo derecho", "Izquierdos y derechas"],
    "Arabic": [
        "كرة على اليسار",
        "قطة على يمين الصورة",
        "في الجانب الأيسر",
        "بيده اليمنى",
        "إلى اليَسار",
        "باليمين",
        "ويساره",
    ],
    "Hindi": ["बाएँ ओर एक कुत्ता", "दाएं हाथ में", "बायीं तरफ", "दायाँ पैर", "बाईं ओर", "दाहिने हाथ", "बायें", "दायीं", "बाएं"],
    "Portuguese": ["um gato à esquerda", "a mão direita", "do lado direito", "Esquerdo"],
    "Russian": [
        "Квадрат слева.",
        "Справа стоит дом",
        "левая рука",
        "в правом углу",
        "Машина едет налево",
        "поворот направо",
        "сдвинут влево, вправо",
        "левее дома",
        "правостороннее движение",
        "левша",
    ],
    "Japanese": ["犬が左にいる", "右手に傘を持つ", "ひだりに", "みぎ"],
    "German": [
        "Ein Quadrat links.",
        "rechts daneben",
        "das linke Bein",
        "in der rechten Hand",
        "Linkskurve",
        "halbrechts",
    ],
    "French": [
        "un chat à gauche",
        "la main droite",
        "le coin supérieur droit",
        "un gaucher",
        "à DROITE",
        "une droitière",
    ],
    "Italian": ["un gatto a sinistra", "il braccio destro", "sulla destra"],
    "Korean": ["왼쪽에 개가 있다", "오른손에 우산", "우측 상단"],
    "Turkish": [
        "solda bir kedi",
        "sağdaki adam",
        "sol üst köşede",
        "Sağ elinde",
        "sol tarafında",
        "Kadın sol bacağını kaldırıyor",
    ],
    "Indonesian": ["kucing di sebelah kiri", "di kanan", "tangan kanannya", "dikiri"],
    "Vietnamese": ["con mèo ở bên trái", "tay phải"],
    "Dutch": ["een kat links", "de rechterhand", "zijn linker been", "aan de rechterkant"],
}
UNNAMED = {
    "English": [
        "a bright light",
        "a cleft",
        "upright bikes",
        "a destroyed bridge",
        "a soldier on a solar panel",
        "a link",
    ],
    "Chinese": ["一只黑狗在雪地里奔跑。"],
    "Spanish": ["el sol sobre el mar", "una mujer sola", "Puesta de sol en la playa con niños"],
    "Arabic": ["قطة سوداء على العشب", "مسار في اليمن"],
    "Hindi": ["एक काला कुत्ता दौड़ रहा है।", "दादा और बाबा"],
    "Portuguese": ["um cão na praia ao pôr do sol"],
    "Russian": ["Лев лежит на траве.", "Полевой цветок", "правило", "Он правит лодкой", "славный день", "оправа"],
    "Japanese": ["黒い犬が雪の上を走っている。"],
    "German": ["Ein grünes Rechteck.", "ein Gelenk", "schlecht", "die Verlinkung"],
    "French": ["à cet endroit", "un homme adroit"],
    "Italian": ["una finestra", "edificio distrutto"],
    "Korean": ["우유 한 잔과 우산"],
    "Turkish": ["sağlıklı bir adam", "soluk bir çiçek", "solgun yaprak", "bir solucan"],
    "Indonesian": ["seekor anjing hitam"],
    "Vietnamese": ["một con chó đen"],
}


@pytest.mark.parametrize("language", NAMED)
def test_sides_that_are_named(language):
    for caption in NAMED[language]:
        assert names_a_side(caption), caption
        assert names_a_side(caption.upper()), caption
        # Macs spell accents, Hindi and Korean in pieces.
        assert names_a_side(unicodedata.normalize("NFD", caption)), caption


@pytest.mark.parametrize("language", UNNAMED)
def test_sides_that_are_not_named(language):
    for caption in UNNAMED[language]:
        assert not names_a_side(caption), caption
