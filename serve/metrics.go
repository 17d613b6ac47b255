package serve

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/oip"
)

// metrics are Triton's, by name, label and meaning, so that existing dashboards fit, and a histogram of each stage of a request.
type metrics struct {
	success, count, executions            prometheus.Counter
	failure                               *prometheus.CounterVec
	request, queue, input, infer, outputs prometheus.Counter // µs
	pending                               prometheus.Gauge
	stages                                *prometheus.HistogramVec
}

// The reasons of a failed request, as Triton names them.
const (
	reasonRejected = "REJECTED" // the queue was full
	reasonCanceled = "CANCELED" // the client went away
	reasonBackend  = "BACKEND"  // the model failed
	reasonOther    = "OTHER"    // the request was bad
)

func newMetrics(reg prometheus.Registerer, model, version string) (*metrics, error) {
	labels := prometheus.Labels{"model": model, "version": version}
	var all []prometheus.Collector
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "nv_inference_" + name, Help: help, ConstLabels: labels})
		all = append(all, c)
		return c
	}
	m := &metrics{
		success:    counter("request_success", "Inference requests answered with success."),
		count:      counter("count", "Inferences performed; a batch of n counts n."),
		executions: counter("exec_count", "Executions of the model."),
		request:    counter("request_duration_us", "Time of successful requests from end to end, µs."),
		queue:      counter("queue_duration_us", "Time that successful requests waited for their turn, µs."),
		input:      counter("compute_input_duration_us", "Time spent reading and decoding inputs, µs."),
		infer:      counter("compute_infer_duration_us", "Time spent running the model, µs."),
		outputs:    counter("compute_output_duration_us", "Time spent encoding and writing outputs, µs."),
		failure: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nv_inference_request_failure", Help: "Inference requests answered with an error, by reason.", ConstLabels: labels,
		}, []string{"reason"}),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "nv_inference_pending_request_count", Help: "Inference requests that wait for their turn.", ConstLabels: labels,
		}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rxvision_inference_stage_duration_seconds", Help: "Time of successful requests by stage: input, queue, compute, output.",
			ConstLabels: labels, Buckets: prometheus.ExponentialBuckets(25e-6, 2, 20), NativeHistogramBucketFactor: 1.1,
		}, []string{"stage"}),
	}
	for _, reason := range []string{reasonRejected, reasonCanceled, reasonBackend, reasonOther} {
		m.failure.WithLabelValues(reason)
	}
	for _, c := range append(all, m.failure, m.pending, m.stages) {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// timings say where the time of a request went.
type timings struct{ input, queue, compute, output time.Duration }

func (m *metrics) succeeded(n int64, t timings) {
	m.success.Inc()
	m.count.Add(float64(n))
	m.request.Add(micros(t.input + t.queue + t.compute + t.output))
	for _, s := range []struct {
		stage string
		total prometheus.Counter
		took  time.Duration
	}{{"input", m.input, t.input}, {"queue", m.queue, t.queue}, {"compute", m.infer, t.compute}, {"output", m.outputs, t.output}} {
		s.total.Add(micros(s.took))
		m.stages.WithLabelValues(s.stage).Observe(s.took.Seconds())
	}
}

func (m *metrics) failed(err error) {
	reason := reasonBackend
	switch {
	case errors.Is(err, errQueueFull) || errors.Is(err, errNoMemory):
		reason = reasonRejected
	case errors.Is(err, context.Canceled):
		reason = reasonCanceled
	case oip.StatusOf(err) != 0:
		reason = reasonOther
	}
	m.failure.WithLabelValues(reason).Inc()
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
