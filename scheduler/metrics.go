package scheduler

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/cluster"
)

// metrics are the scheduler's own; all are zero on a server that does not lead.
type metrics struct {
	evals   *prometheus.GaugeVec // by state: ready, waiting, blocked
	planned prometheus.Histogram
	placed  prometheus.Counter
	stopped prometheus.Counter
	refused prometheus.Counter
	entries prometheus.Counter
	failed  prometheus.Counter
	reaped  prometheus.Counter

	launched prometheus.Counter

	scaling *prometheus.GaugeVec // policies by state
	pending *prometheus.GaugeVec // by node pool and resource
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "rxvision_scheduler_" + name, Help: help})
	}
	return &metrics{
		evals: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "rxvision_scheduler_evaluations", Help: "Open evaluations by state: ready, waiting for their time, blocked.",
		}, []string{"state"}),
		planned: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "rxvision_scheduler_plan_seconds", Help: "Time to make one plan, commit not included.",
			Buckets: prometheus.ExponentialBuckets(20e-6, 4, 10),
		}),
		placed:  counter("placements_total", "Allocations placed or updated in place."),
		stopped: counter("stops_total", "Allocations asked to stop."),
		refused: counter("refused_nodes_total", "Nodes on which a plan no longer fitted when it was committed."),
		entries: counter("plan_entries_total", "Log entries with plans."),
		failed:  counter("failed_evaluations_total", "Evaluations given up after too many refused plans."),
		reaped:  counter("reaped_total", "Ended records forgotten."),

		launched: counter("launches_total", "Periodic jobs launched at their times."),

		scaling: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "rxvision_autoscaler_policies", Help: "Enabled scaling policies by state: steady, changed, held (a change waits), missing-metric.",
		}, []string{"state"}),
		pending: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "rxvision_scheduler_pending",
			Help: "What allocations ask for that wait for room, by node pool: allocations, cpu (MHz), memory (MiB), and devices by their names (thousandths).",
		}, []string{"node_pool", "resource"}),
	}
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.evals, m.planned, m.placed, m.stopped, m.refused, m.entries, m.failed, m.reaped, m.launched, m.scaling, m.pending} {
		errs = append(errs, r.Register(c))
	}
	return errors.Join(errs...)
}

func (m *metrics) queued(c counts) {
	m.evals.WithLabelValues("ready").Set(float64(c.ready))
	m.evals.WithLabelValues("waiting").Set(float64(c.waiting))
	m.evals.WithLabelValues("blocked").Set(float64(c.blocked))
}

// idle resets what only a leader has.
func (m *metrics) idle() {
	m.queued(counts{})
	m.pending.Reset()
}

// count adds what was committed of a plan.
func (m *metrics) count(p *cluster.Plan, r cluster.PlanResult) {
	if r.Stale {
		return
	}
	refused := map[string]bool{}
	for _, n := range r.Refused {
		refused[n] = true
	}
	for _, a := range p.Place {
		if !refused[a.NodeID] {
			m.placed.Inc()
		}
	}
	m.stopped.Add(float64(len(p.Stop)))
}
