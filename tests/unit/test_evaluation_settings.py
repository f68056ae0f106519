import pytest

from pilotfish.errors import ConfigError
from pilotfish.evaluation.settings import Setting, controls_of, tracker_name, with_controls


def guided(name: str = "guided", *, weight: float = 1.0, temperature: float = 1.0) -> Setting:
    return Setting(name=name, guides={"g": weight}, temperature=temperature)


def temperatures(settings: tuple[Setting, ...]) -> list[float]:
    return [setting.temperature for setting in settings if setting.is_base]


def test_a_guided_setting_brings_sampled_sharpened_and_greedy_controls():
    every = with_controls([guided(weight=3.0)])
    assert temperatures(every) == [1.0, 0.25, 0.0]
    assert [setting.name for setting in every] == ["base", "base T=0.25", "base greedy", "guided"]


def test_every_distinct_weight_brings_its_own_sharpened_control_once():
    settings = [guided("a", weight=1.0), guided("b", weight=1.0), guided("c", weight=3.0)]
    assert temperatures(with_controls(settings)) == [1.0, 0.5, 0.25, 0.0]


def test_weights_of_several_guides_add_up_to_one_sharpening():
    both = Setting(name="both", guides={"g": 1.0, "h": 2.0})
    assert 0.25 in temperatures(with_controls([both]))


def test_sharpening_at_a_lower_temperature_is_controlled_at_both_temperatures():
    every = with_controls([guided(weight=1.0, temperature=0.6)])
    assert temperatures(every) == [0.6, 0.5, 0.3, 0.0]


def test_the_reference_is_the_base_at_temperature_one_if_anything_samples_there():
    every = with_controls([guided("cool", temperature=0.7), guided("plain")])
    assert every[0].is_base
    assert every[0].temperature == 1.0


def test_the_reference_of_greedy_settings_is_sampled():
    assert with_controls([guided(temperature=0.0)])[0].temperature == 1.0


def test_a_control_that_was_listed_is_not_decoded_twice():
    mine = Setting(name="my base")
    every = with_controls([guided(weight=1.0), mine])
    assert [setting.name for setting in every] == ["my base", "base T=0.5", "base greedy", "guided"]


def test_controls_share_the_truncation_of_the_setting():
    setting = Setting(name="nucleus", guides={"g": 1.0}, top_p=0.9)
    drawn = [(s.temperature, s.top_p) for s in with_controls([setting]) if s.is_base]
    assert drawn == [(1.0, 0.9), (0.5, 0.9), (0.0, 1.0)]


def test_adding_controls_again_changes_nothing():
    every = with_controls([guided("a"), guided("b", weight=2.0, temperature=0.7)])
    assert with_controls(every) == every


def test_a_setting_of_weight_zero_is_the_base():
    assert Setting(name="off", guides={"g": 0.0}).is_base


def test_a_guided_setting_is_held_against_its_own_controls_only():
    every = with_controls([guided("one", weight=1.0), guided("three", weight=3.0)])
    assert controls_of(every[-2], every) == ["base", "base T=0.5", "base greedy"]
    assert controls_of(every[-1], every) == ["base", "base T=0.25", "base greedy"]


def test_a_guided_setting_named_like_a_control_is_refused():
    with pytest.raises(ConfigError, match="base greedy"):
        with_controls([guided("base greedy")])


def test_names_that_trackers_cannot_tell_apart_are_refused():
    with pytest.raises(ConfigError, match="g w1"):
        with_controls([guided("g w=1"), guided("g w1")])


def test_tracker_names_keep_letters_digits_dots_dashes_and_spaces():
    assert tracker_name("GenARM w=0.5, T=0.7 (a-b)") == "GenARM w0.5 T0.7 a-b"


def test_args_of_a_guide_that_does_not_act_are_refused():
    with pytest.raises(ValueError, match="'h', which is not among the guides"):
        Setting(name="x", guides={"g": 1.0}, args={"h": {"p_t": 0.5}})


def test_args_change_no_control_and_make_no_guide_of_a_base():
    plain, changed = guided("x"), guided("x").model_copy(update={"args": {"g": {"p_t": 0.5}}})
    assert with_controls([changed])[:-1] == with_controls([plain])[:-1]
    assert controls_of(changed, with_controls([changed])) == ["base", "base T=0.5", "base greedy"]
    assert Setting(name="off", guides={"g": 0.0}, args={"g": {"p_t": 0.5}}).is_base
