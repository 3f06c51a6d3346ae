//! Former names of metrics, exported beside the present ones where `metrics.legacy_names` is set,
//! so that dashboards and alerts can move within one release.
//!
//! A metric that was renamed is exported a second time, under its old name, label and label values.
//! A metric that kept its name and got another label carries both labels on one series: a sum over
//! the metric counts each event once, as before.

use prometheus::proto::{LabelPair, MetricFamily};

/// A metric with a former name or label.
struct Renamed {
    old: &'static str,
    new: &'static str,
    label: Option<RenamedLabel>,
}

/// The label of a renamed metric.
struct RenamedLabel {
    old: &'static str,
    new: &'static str,
    /// Old and new value, where they differ.
    values: &'static [(&'static str, &'static str)],
}

const RENAMED: &[Renamed] = &[
    labelled(
        "gateway_handshakes_total",
        "gateway_handshakes_total",
        "outcome",
        "result",
        &[("bad", "invalid"), ("origin", "origin_denied"), ("limited", "rate_limited")],
    ),
    labelled(
        "gateway_publishes_total",
        "gateway_publishes_total",
        "outcome",
        "result",
        &[("bounded", "limit_reached")],
    ),
    labelled(
        "gateway_agreements_total",
        "gateway_recovery_rounds_total",
        "outcome",
        "complete",
        &[("complete", "true"), ("incomplete", "false")],
    ),
    labelled(
        "gateway_arrivals_total",
        "gateway_bus_entries_received_total",
        "outcome",
        "result",
        &[("restarted", "epoch_changed"), ("unwanted", "not_subscribed"), ("fenced", "no_lease")],
    ),
    labelled(
        "gateway_healed_rooms_total",
        "gateway_log_restores_total",
        "outcome",
        "result",
        &[
            ("whole", "unchanged"),
            ("healed", "restored"),
            ("other", "epoch_changed"),
            ("refused", "failed"),
        ],
    ),
    labelled(
        "gateway_repairs_total",
        "gateway_log_repairs_total",
        "outcome",
        "result",
        &[("whole", "complete"), ("healed", "reconciled")],
    ),
    renamed("gateway_lags_total", "gateway_slow_consumers_total"),
    renamed("gateway_notices_dropped_total", "gateway_ephemeral_events_dropped_total"),
    renamed("gateway_notices_total", "gateway_ephemeral_events_total"),
    renamed("gateway_orphans_total", "gateway_reappended_messages_total"),
    renamed("gateway_probes_lost_total", "gateway_bus_probe_timeouts_total"),
    renamed("gateway_tail_repeats_total", "gateway_republished_total"),
    renamed("gateway_tail_dropped_total", "gateway_unconfirmed_publishes_dropped_total"),
    labelled(
        "gateway_http_dropped_total",
        "gateway_http_connections_dropped_total",
        "reason",
        "reason",
        &[
            ("address", "per_ip_limit"),
            ("answer", "write_timeout"),
            ("header", "header_timeout"),
            ("room", "evicted"),
        ],
    ),
    renamed("gateway_ids_bytes", "gateway_dedup_ids_bytes"),
    renamed("gateway_ids_dropped_total", "gateway_dedup_id_buckets_dropped_total"),
    labelled(
        "gateway_input_waits_total",
        "gateway_input_throttles_total",
        "cause",
        "reason",
        &[("address", "per_ip_overhead")],
    ),
    renamed("gateway_input_closes_total", "gateway_input_rate_limit_closes_total"),
    labelled(
        "gateway_durable_refusals_total",
        "gateway_storage_rejections_total",
        "bound",
        "reason",
        &[("marks", "read_marks")],
    ),
    renamed("gateway_api_refusals_total", "gateway_api_rejections_total"),
    labelled(
        "gateway_password_checks_total",
        "gateway_room_password_checks_total",
        "result",
        "result",
        &[("fits", "correct")],
    ),
    labelled(
        "gateway_redis_bad_values_total",
        "gateway_redis_invalid_values_total",
        "kind",
        "kind",
        &[
            ("ids", "dedup_id"),
            ("mark", "read_mark"),
            ("message", "pubsub_message"),
            ("meta", "log_meta"),
            ("order", "command"),
            ("record", "room_config"),
            ("type", "key_type"),
            ("unheard", "unconfirmed"),
        ],
    ),
];

const fn renamed(old: &'static str, new: &'static str) -> Renamed {
    Renamed { old, new, label: None }
}

const fn labelled(
    old: &'static str,
    new: &'static str,
    old_label: &'static str,
    new_label: &'static str,
    values: &'static [(&'static str, &'static str)],
) -> Renamed {
    Renamed { old, new, label: Some(RenamedLabel { old: old_label, new: new_label, values }) }
}

/// Adds former names and labels to gathered families, and keeps the order of names.
pub(super) fn add(families: &mut Vec<MetricFamily>) {
    let mut copies = Vec::new();
    for family in &mut *families {
        let Some(renamed) = RENAMED.iter().find(|renamed| renamed.new == family.name()) else {
            continue;
        };
        if renamed.old == renamed.new {
            relabel(family, renamed, true);
        } else {
            let mut copy = family.clone();
            copy.set_name(renamed.old.to_owned());
            copy.set_help(format!("Former name of {}", renamed.new));
            relabel(&mut copy, renamed, false);
            copies.push(copy);
        }
    }
    families.append(&mut copies);
    families.sort_by(|a, b| a.name().cmp(b.name()));
}

/// Gives each series the old label with its old value, beside the new label or in place of it.
fn relabel(family: &mut MetricFamily, renamed: &Renamed, keep_new: bool) {
    let Some(label) = &renamed.label else { return };
    for metric in family.mut_metric() {
        let mut pairs = metric.take_label();
        if let Some(at) = pairs.iter().position(|pair| pair.name() == label.new) {
            let mut old = LabelPair::default();
            old.set_name(label.old.to_owned());
            old.set_value(label.old_value(pairs[at].value()).to_owned());
            if !keep_new {
                pairs.remove(at);
            }
            pairs.push(old);
            pairs.sort_by(|a, b| a.name().cmp(b.name()));
        }
        metric.set_label(pairs);
    }
}

impl RenamedLabel {
    fn old_value<'a>(&self, new: &'a str) -> &'a str {
        self.values.iter().find(|(_, value)| *value == new).map_or(new, |(old, _)| old)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::telemetry::metrics::{HandshakeResult, Metrics};

    #[test]
    fn former_names_are_exported_only_on_request() {
        let metrics = Metrics::new();
        metrics.handshakes.of(HandshakeResult::RateLimited).inc();
        let text = metrics.render();
        assert!(text.contains("gateway_handshakes_total{result=\"rate_limited\"} 1\n"), "{text}");
        assert!(!text.contains("gateway_handshakes_total{outcome="), "{text}");

        let text = metrics.with_legacy_names(true).render();
        let both = "gateway_handshakes_total{outcome=\"limited\",result=\"rate_limited\"} 1\n";
        assert!(text.contains(both), "{text}");
    }

    #[test]
    fn the_table_maps_metrics_and_labels_that_exist() {
        let metrics = Metrics::new();
        let text = metrics.render();
        let names: Vec<&str> = Metrics::describe().into_iter().map(|(name, ..)| name).collect();
        let mut seen = BTreeSet::new();
        for Renamed { old, new, label } in RENAMED {
            assert!(seen.insert(*old), "{old} is listed twice");
            assert!(names.iter().any(|name| name == new), "there is no {new}");
            assert!(old == new || !names.iter().any(|name| name == old), "{old} still exists");
            if let Some(label) = label {
                assert!(text.contains(&format!("{new}{{{}=\"", label.new)), "{new} {}", label.new);
                for (_, value) in label.values {
                    let series = format!("{new}{{{}=\"{value}\"}}", label.new);
                    assert!(text.contains(&series), "there is no {series}");
                }
            }
        }
    }
}
