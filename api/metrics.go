package api

import (
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/nomad/api"
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	open     prometheus.Gauge
	blocking prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rxvision_http_requests_total", Help: "Requests answered, by route, method and status.",
		}, []string{"route", "method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rxvision_http_request_seconds", Help: "Time to answer; blocking queries and streams are left out.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9),
		}, []string{"route"}),
		open:     prometheus.NewGauge(prometheus.GaugeOpts{Name: "rxvision_http_requests_open", Help: "Requests under way."}),
		blocking: prometheus.NewGauge(prometheus.GaugeOpts{Name: "rxvision_http_blocking_queries", Help: "Blocking queries that wait for a change."}),
	}
	reg.MustRegister(m.requests, m.seconds, m.open, m.blocking)
	return m
}

func (m *metrics) done(route, method string, status int, lasting bool, start time.Time) {
	m.requests.WithLabelValues(route, method, strconv.Itoa(status)).Inc()
	if !lasting {
		m.seconds.WithLabelValues(route).Observe(time.Since(start).Seconds())
	}
}

// metrics answers /v1/metrics in the shape of Nomad's, or for Prometheus.
func (s *Server) readMetrics(r *request) (any, error) {
	switch format := r.query.Get("format"); format {
	case "prometheus":
		return streamFunc(func(w http.ResponseWriter) error {
			s.prom.ServeHTTP(w, r.Request)
			return nil
		}), nil
	case "":
		return s.metricsSummary()
	default:
		return nil, badRequest("unknown metrics format %q: leave it out for JSON, or use prometheus", format)
	}
}

func (s *Server) metricsSummary() (*api.MetricsSummary, error) {
	families, err := s.cfg.Registry.Gather()
	if err != nil {
		return nil, fmt.Errorf("gather metrics: %w", err)
	}
	out := &api.MetricsSummary{
		Timestamp: time.Now().UTC().Format("2006-01-02 15:04:05 -0700 MST"),
		Gauges:    []api.GaugeValue{}, Points: []api.PointValue{}, Counters: []api.SampledValue{}, Samples: []api.SampledValue{},
	}
	for _, f := range families {
		for _, m := range f.Metric {
			labels := map[string]string{}
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			sampled := func(count uint64, sum float64) api.SampledValue {
				v := api.SampledValue{Name: f.GetName(), DisplayLabels: labels, AggregateSample: &api.AggregateSample{Count: int(count), Sum: finite(sum)}}
				if count > 0 {
					v.Mean = finite(sum / float64(count))
				}
				return v
			}
			switch {
			case m.Counter != nil:
				out.Counters = append(out.Counters, sampled(uint64(m.Counter.GetValue()), m.Counter.GetValue()))
			case m.Gauge != nil:
				out.Gauges = append(out.Gauges, api.GaugeValue{Name: f.GetName(), Value: float32(finite(m.Gauge.GetValue())), DisplayLabels: labels})
			case m.Histogram != nil:
				out.Samples = append(out.Samples, sampled(m.Histogram.GetSampleCount(), m.Histogram.GetSampleSum()))
			case m.Summary != nil:
				out.Samples = append(out.Samples, sampled(m.Summary.GetSampleCount(), m.Summary.GetSampleSum()))
			}
		}
	}
	return out, nil
}

// finite replaces what JSON cannot hold by 0.
func finite(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	return v
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
