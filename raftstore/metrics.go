package raftstore

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/cluster"
)

// The gauge that Store and ReadOnly share.
const (
	diskWritable     = "rxvision_raftstore_disk_writable"
	diskWritableHelp = "1 while the data folder can be written, 0 when the disk is full, stalled or broken."
)

// metrics is what the store counts.
type metrics struct {
	applies   *prometheus.HistogramVec // seconds, by the error's code
	snapshots prometheus.Histogram     // seconds
	size      prometheus.Gauge         // bytes of the last snapshot
	gauges    []prometheus.Collector
}

func newMetrics(s *Store) *metrics {
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	return &metrics{
		applies: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rxvision_raft_apply_seconds", Help: "Time from a command's proposal to its result, by error code (ok: none).",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"code"}),
		snapshots: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "rxvision_raft_snapshot_seconds", Help: "Time to write a snapshot of the state.",
			Buckets: prometheus.ExponentialBuckets(0.01, 4, 8),
		}),
		size: prometheus.NewGauge(prometheus.GaugeOpts{Name: "rxvision_raft_snapshot_bytes", Help: "Size of the last snapshot written."}),
		gauges: []prometheus.Collector{
			gauge("rxvision_raft_applied_index", "Log index of the last applied command.", func() float64 { return float64(s.fsm.appliedIndex()) }),
			gauge("rxvision_raft_leader", "1 while this server is the leader.", func() float64 {
				if s.IsLeader() {
					return 1
				}
				return 0
			}),
			gauge(diskWritable, diskWritableHelp, func() float64 {
				if s.DiskState().OK {
					return 1
				}
				return 0
			}),
			s.disk.appends,
		},
	}
}

func (m *metrics) all() []prometheus.Collector {
	return append([]prometheus.Collector{m.applies, m.snapshots, m.size}, m.gauges...)
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for _, c := range m.all() {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.all() {
		r.Unregister(c)
	}
}

func (m *metrics) applied(start time.Time, err error) {
	code := "ok"
	if err != nil {
		code = string(cluster.CodeOf(err))
	}
	m.applies.WithLabelValues(code).Observe(time.Since(start).Seconds())
}

// appendSeconds is made with the disk, before the other metrics.
func appendSeconds() prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "rxvision_raftstore_append_seconds", Help: "Time to write a batch of log entries to the disk, synced.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16),
	})
}
