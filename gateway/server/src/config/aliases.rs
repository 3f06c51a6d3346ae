//! Former names of options, accepted for one release from the file, the environment and `--set`.

use std::collections::BTreeMap;

use super::reader::GivenValue;

/// Former and present name.
const RENAMED: &[(&str, &str)] = &[
    ("heartbeat.silence_max", "heartbeat.idle_timeout"),
    ("heartbeat.stall_max", "heartbeat.write_timeout"),
    ("publish.wait", "publish.timeout"),
    ("rooms.marks_max", "rooms.read_marks_max"),
    ("presence.individual_max", "presence.event_members_max"),
    ("presence.named_max", "presence.diff_members_max"),
    ("hub.ids_bytes_max", "hub.dedup_ids_bytes_max"),
    ("hub.lingering_rooms_max", "hub.empty_rooms_max"),
    ("limits.api_refusals_per_second_per_ip", "limits.api_key_failures_per_second_per_ip"),
];

/// Values by the present names of their options.
pub(super) struct Resolved {
    /// One warning per former name that was used.
    pub(super) warnings: Vec<String>,
    /// Former name and text of each contradiction between a former name and the present one.
    pub(super) contradictions: Vec<(String, String)>,
    /// The former names that were used, by the present ones.
    pub(super) former: BTreeMap<&'static str, &'static str>,
}

/// Moves values that were given under former names to the present names.
///
/// Both names may be given with the same value. With different values neither is used, since the
/// sources do not say which one is meant.
pub(super) fn resolve(values: &mut BTreeMap<String, GivenValue>) -> Resolved {
    let (mut warnings, mut contradictions) = (Vec::new(), Vec::new());
    let mut former = BTreeMap::new();
    for (old, new) in RENAMED {
        let Some(value) = values.remove(*old) else { continue };
        warnings.push(format!(
            "the option {old} is now called {new}: use the new name, the next release accepts no other"
        ));
        match values.get(*new) {
            Some(other) if other.text != value.text => {
                let (value, other) = (value.text, &other.text);
                let text = format!(
                    "is the former name of {new}, and both are set, to `{value}` and `{other}`: \
                     remove {old}"
                );
                contradictions.push(((*old).to_owned(), text));
            }
            Some(_) => {}
            None => {
                former.insert(*new, *old);
                values.insert((*new).to_owned(), value);
            }
        }
    }
    Resolved { warnings, contradictions, former }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Config, ConfigSources};

    fn load(
        file: &str,
        environment: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<Config, String> {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file).unwrap();
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let sources = ConfigSources {
            file: Some(path.path().to_owned()),
            environment: Some(environment.iter().map(own).collect()),
            flags: flags.iter().map(own).collect(),
        };
        Config::load(sources).map_err(|errors| errors.to_string())
    }

    #[test]
    fn the_table_maps_removed_options_to_present_ones() {
        let options = Config::describe();
        for (old, new) in RENAMED {
            assert!(options.contains(&format!("| `{new}` |")), "there is no option {new}");
            assert!(!options.contains(&format!("| `{old}` |")), "{old} is still an option");
        }
    }

    #[test]
    fn former_names_work_from_every_source_with_a_warning() {
        let config = load(
            "[publish]\nwait = \"7s\"\n",
            &[("GATEWAY__HEARTBEAT__SILENCE_MAX", "70s")],
            &[("heartbeat.stall_max", "40s")],
        )
        .unwrap_or_else(|text| panic!("{text}"));
        assert_eq!(config.session.wait_max, Duration::from_secs(7));
        assert_eq!(config.http.heartbeat.idle_timeout, Duration::from_secs(70));
        assert_eq!(config.http.heartbeat.write_timeout, Duration::from_secs(40));
        assert_eq!(config.warnings.len(), 3, "{:?}", config.warnings);
        for (old, new) in [
            ("publish.wait", "publish.timeout"),
            ("heartbeat.silence_max", "heartbeat.idle_timeout"),
            ("heartbeat.stall_max", "heartbeat.write_timeout"),
        ] {
            let names = |warning: &String| warning.contains(old) && warning.contains(new);
            assert!(config.warnings.iter().any(names), "{old}");
        }
    }

    #[test]
    fn both_names_of_an_option_must_agree() {
        let (old, new) = ("publish.wait", "publish.timeout");
        let Err(text) = load("", &[], &[(old, "3s"), (new, "4s")]) else { panic!("accepted") };
        assert!(text.contains("1 error(s)") && text.contains("`3s` and `4s`"), "{text}");
        assert!(text.contains(old) && text.contains(new), "{text}");
        let loaded =
            load("[publish]\ntimeout = \"4s\"\n", &[("GATEWAY__PUBLISH__WAIT", "3s")], &[]);
        assert!(loaded.is_err_and(|text| text.contains("`3s` and `4s`")));

        let config = load("", &[], &[(old, "3s"), (new, "3s")]);
        assert!(config.is_ok_and(|config| config.session.wait_max == Duration::from_secs(3)));
    }

    #[test]
    fn an_error_under_a_former_name_shows_both_names() {
        let Err(text) = load("", &[], &[("publish.wait", "soon")]) else { panic!("accepted") };
        assert!(text.contains("publish.timeout (GATEWAY__PUBLISH__TIMEOUT): `soon`"), "{text}");
        assert!(text.contains("set by its former name publish.wait"), "{text}");
    }
}
