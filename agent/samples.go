package agent

import (
	"slices"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// sampleEvery is the time between two measurements of allocations whose groups are scaled by them.
const sampleEvery = 2 * time.Second

// samples measures what the scaling policies of running allocations ask for; empty when none asks.
func (a *Agent) samples(now time.Time) (out []*pb.Sample) {
	a.mu.Lock()
	runners := make([]*runner, 0, len(a.runners))
	for _, r := range a.runners {
		runners = append(runners, r)
	}
	a.mu.Unlock()
	var gpus map[string]gpu.Stats // read once, if anybody asks
	for _, r := range runners {
		r.mu.Lock()
		g, alloc := r.group(), r.alloc
		r.mu.Unlock()
		if g == nil || g.Scaling == nil || !g.Scaling.Enabled || alloc.ServerTerminal() {
			continue
		}
		asked := func(metrics ...string) bool {
			return slices.ContainsFunc(g.Scaling.Checks, func(c *cluster.ScalingCheck) bool { return slices.Contains(metrics, c.Query) })
		}
		add := func(metric string, value float64) {
			out = append(out, &pb.Sample{Of: r.id, Metric: metric, Value: value})
		}
		if asked(cluster.MetricCPU, cluster.MetricMemory) {
			if cpu, memory, ok := r.share(now, g); ok {
				add(cluster.MetricCPU, cpu)
				add(cluster.MetricMemory, memory)
			}
		}
		if asked(cluster.MetricGPU, cluster.MetricGPUMemory) {
			if gpus == nil {
				gpus = a.gpuStats()
			}
			var busy, used mean
			for _, t := range g.Tasks {
				for _, id := range task.Devices(alloc, t.Name) {
					s := gpus[id]
					if s.GPUPercent != nil {
						busy.add(float64(*s.GPUPercent))
					}
					if s.UsedMiB != nil && s.MemoryMiB != nil && *s.MemoryMiB > 0 {
						used.add(100 * float64(*s.UsedMiB) / float64(*s.MemoryMiB))
					}
				}
			}
			if busy.n > 0 {
				add(cluster.MetricGPU, busy.value())
			}
			if used.n > 0 {
				add(cluster.MetricGPUMemory, used.value())
			}
		}
	}
	return out
}

// gpuStats are the devices' statistics by ID; empty when they cannot be had.
func (a *Agent) gpuStats() map[string]gpu.Stats {
	out := map[string]gpu.Stats{}
	all, err := a.gpus.Stats()
	if err != nil {
		a.warnOnce("statistics: " + err.Error())
	}
	for _, s := range all {
		out[s.UUID] = s
	}
	return out
}

// share is what part of the processor and memory that they ask for the running tasks use, in percent.
func (r *runner) share(now time.Time, g *cluster.TaskGroup) (cpu, memory float64, ok bool) {
	var mhz, mib float64
	for _, spec := range g.Tasks {
		t := r.tasks[spec.Name]
		if t == nil || spec.Resources == nil {
			continue
		}
		u := t.measure(now, r.a.host.mhz)
		if u == nil {
			continue
		}
		ok = true
		cpu += u.CpuStats.TotalTicks
		memory += float64(max(u.MemoryStats.RSS, u.MemoryStats.Usage)) / (1 << 20)
		mhz, mib = mhz+float64(spec.Resources.CPU), mib+float64(spec.Resources.MemoryMB)
	}
	if mhz == 0 || mib == 0 {
		return 0, 0, false
	}
	return 100 * cpu / mhz, 100 * memory / mib, ok
}

// mean adds up what is averaged.
type mean struct {
	sum float64
	n   int
}

func (m *mean) add(v float64) { m.sum, m.n = m.sum+v, m.n+1 }

func (m *mean) value() float64 { return m.sum / float64(m.n) }
