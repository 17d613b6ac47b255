package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/rxvision/rxvision/cluster"
)

// metrics are the agent's own; the cache registers its own.
type metrics struct {
	restarts  prometheus.Counter
	connected prometheus.Gauge
	selfTests *prometheus.CounterVec // by result
}

func (a *Agent) newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		restarts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rxvision_agent_task_restarts_total", Help: "Restarts of tasks in place.",
		}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "rxvision_agent_connected", Help: "1 while the agent is attached to a server.",
		}),
	}
	m.selfTests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rxvision_gpu_self_tests_total", Help: "Self-tests of devices that had failed, by result: passed or failed.",
	}, []string{"result"})
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rxvision_agent_updates_waiting", Help: "Allocations whose newest state no server has acknowledged.",
	}, func() float64 { return float64(a.updates.waiting()) })
	for _, c := range []prometheus.Collector{m.restarts, m.connected, m.selfTests, waiting, &nodeCollector{a}} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// nodeCollector gives counts of allocations and the GPUs' telemetry when scraped.
type nodeCollector struct{ a *Agent }

var (
	descAllocs = prometheus.NewDesc("rxvision_agent_allocations", "Allocations on the node by client status.", []string{"status"}, nil)
	descServe  = prometheus.NewDesc("rxvision_agent_model_ready", "1 while the model of an allocation is ready.", []string{"alloc", "task", "model", "version"}, nil)

	gpuLabels   = []string{"device"}
	descHealthy = prometheus.NewDesc("rxvision_gpu_healthy", "1 while work may be given to the device.", gpuLabels, nil)
	descUsed    = prometheus.NewDesc("rxvision_gpu_memory_used_bytes", "Device memory in use.", gpuLabels, nil)
	descTotal   = prometheus.NewDesc("rxvision_gpu_memory_total_bytes", "Device memory.", gpuLabels, nil)
	descBusy    = prometheus.NewDesc("rxvision_gpu_utilization_ratio", "Share of time with a kernel running.", gpuLabels, nil)
	descTemp    = prometheus.NewDesc("rxvision_gpu_temperature_celsius", "Temperature of the device.", gpuLabels, nil)
	descPower   = prometheus.NewDesc("rxvision_gpu_power_watts", "Power drawn.", gpuLabels, nil)
)

func (c *nodeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descAllocs, descServe, descHealthy, descUsed, descTotal, descBusy, descTemp, descPower} {
		ch <- d
	}
}

func (c *nodeCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counts := map[string]int{
		cluster.AllocClientPending: 0, cluster.AllocClientRunning: 0, cluster.AllocClientComplete: 0, cluster.AllocClientFailed: 0,
	}
	c.a.mu.Lock()
	for _, r := range c.a.runners {
		r.mu.Lock()
		counts[r.local.ClientStatus]++
		for name, t := range r.local.Tasks {
			if s := t.Serving; s != nil {
				gauge(descServe, number(s.Ready), r.id, name, s.Model, itoa(s.Version))
			}
		}
		r.mu.Unlock()
	}
	node := c.a.node
	c.a.mu.Unlock()
	for status, n := range counts {
		gauge(descAllocs, float64(n), status)
	}
	for _, g := range node.NodeResources.Devices {
		for _, d := range g.Instances {
			gauge(descHealthy, number(d.Healthy), d.ID)
		}
	}
	all, err := c.a.gpus.Stats()
	if err != nil {
		return // the health gauges say it
	}
	for _, s := range all {
		for _, m := range []struct {
			desc  *prometheus.Desc
			value *int64
			unit  float64
		}{
			{descUsed, s.UsedMiB, 1 << 20},
			{descTotal, s.MemoryMiB, 1 << 20},
			{descBusy, s.GPUPercent, 0.01},
			{descTemp, s.TemperatureC, 1},
			{descPower, s.PowerW, 1},
		} {
			if m.value != nil {
				gauge(m.desc, float64(*m.value)*m.unit, s.UUID)
			}
		}
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// serveHTTP serves /metrics and /health until ctx ends.
func (a *Agent) serveHTTP(ctx context.Context) {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.cfg.Metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /health", a.health)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(a.listener); !errors.Is(err, http.ErrServerClosed) {
		a.log.Error("the agent's HTTP listener ended", "error", err)
	}
}

// health answers 200 while the agent works; being without a server is no fault of
// its own and only told.
func (a *Agent) health(w http.ResponseWriter, _ *http.Request) {
	message := "ok"
	if !a.isConnected() {
		message = "no server is connected; tasks run on"
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"client": map[string]any{"ok": true, "message": message}})
}
