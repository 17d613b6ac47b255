package agent

import (
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/fleet/pb"
)

// The types below have the shapes of Nomad's API
// (https://developer.hashicorp.com/nomad/api-docs/client).

type hostStats struct {
	Timestamp        int64
	Uptime           uint64 // seconds
	CPUTicksConsumed float64
	Memory           *hostMemory
	CPU              []hostCPUStats
	DiskStats        []hostDiskStats
	AllocDirStats    *hostDiskStats
	DeviceStats      []*deviceGroupStats
}

type hostMemory struct{ Total, Used, Available, Free uint64 }

type deviceGroupStats struct {
	Vendor, Type, Name string
	InstanceStats      map[string]*deviceStats
}

type deviceStats struct {
	Summary   gpu.StatValue
	Stats     statObject
	Timestamp time.Time
}

type statObject struct {
	Nested     map[string]statObject
	Attributes map[string]gpu.StatValue
}

type resourceUsage struct {
	CpuStats    cpuStats
	MemoryStats memoryStats
	DeviceStats []*deviceGroupStats
}

type cpuStats struct {
	SystemMode, UserMode, Percent, TotalTicks float64
	ThrottledPeriods, ThrottledTime           uint64
	Measured                                  []string
}

type memoryStats struct {
	RSS, Cache, Swap, MappedFile, Usage, MaxUsage, KernelUsage, KernelMaxUsage uint64
	Measured                                                                   []string
}

type taskUsage struct {
	ResourceUsage *resourceUsage
	Timestamp     int64
	Pids          map[string]*resourceUsage
}

type allocUsage struct {
	ResourceUsage *resourceUsage
	Tasks         map[string]*taskUsage
	Timestamp     int64
}

// nodeStats measures the host.
func (a *Agent) nodeStats() *hostStats {
	m := keyValues("/proc/meminfo", ":")
	s := &hostStats{
		Timestamp: time.Now().UnixNano(),
		CPU:       a.cpu.sample(a.host.mhz),
		Memory: &hostMemory{
			Total: uint64(meminfo(m, "MemTotal")), Free: uint64(meminfo(m, "MemFree")), Available: uint64(meminfo(m, "MemAvailable")),
		},
		DeviceStats: a.deviceStats(nil),
	}
	s.Memory.Used = s.Memory.Total - min(s.Memory.Available, s.Memory.Total)
	for _, c := range s.CPU {
		s.CPUTicksConsumed += c.TotalTicks
	}
	s.Uptime = uint64(uptime().Seconds())
	if d, ok := diskUsage(a.allocRoot); ok {
		s.AllocDirStats = &d
		disk := d
		disk.Device, disk.Mountpoint = a.host.diskDevice, a.host.mountpoint
		s.DiskStats = []hostDiskStats{disk}
	}
	return s
}

// deviceStats measures the GPUs, those of only when it is not nil.
func (a *Agent) deviceStats(only map[string]bool) []*deviceGroupStats {
	byID := a.gpuStats()
	var groups []*deviceGroupStats
	for _, d := range a.nodeRecord().NodeResources.Devices {
		g := &deviceGroupStats{Vendor: d.Vendor, Type: d.Type, Name: d.Name, InstanceStats: map[string]*deviceStats{}}
		for _, i := range d.Instances {
			if s, ok := byID[i.ID]; ok && (only == nil || only[i.ID]) {
				g.InstanceStats[i.ID] = &deviceStats{
					Summary: s.Summary(), Stats: statObject{Attributes: s.Values()}, Timestamp: s.Time,
				}
			}
		}
		if len(g.InstanceStats) > 0 {
			groups = append(groups, g)
		}
	}
	return groups
}

// usageSample is an earlier measurement of a task, to tell its rate.
type usageSample struct {
	at      time.Time
	cpu     time.Duration
	percent float64
}

// allocStats measures the running tasks of an allocation.
func (a *Agent) allocStats(q *pb.AllocStatsRequest) (*allocUsage, error) {
	r, err := a.known(q.AllocId)
	if err != nil {
		return nil, err
	}
	tasks, err := r.chosen(q.Task)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	total := newUsage()
	all := &allocUsage{ResourceUsage: total, Tasks: map[string]*taskUsage{}, Timestamp: now.UnixNano()}
	r.mu.Lock()
	alloc := r.alloc
	r.mu.Unlock()
	for _, t := range tasks {
		u := t.measure(now, a.host.mhz)
		if u == nil {
			continue
		}
		if ids := task.Devices(alloc, t.name); len(ids) > 0 {
			only := map[string]bool{}
			for _, id := range ids {
				only[id] = true
			}
			u.DeviceStats = a.deviceStats(only)
			total.DeviceStats = append(total.DeviceStats, u.DeviceStats...)
		}
		total.CpuStats.Percent += u.CpuStats.Percent
		total.CpuStats.UserMode += u.CpuStats.UserMode
		total.CpuStats.TotalTicks += u.CpuStats.TotalTicks
		total.MemoryStats.RSS += u.MemoryStats.RSS
		total.MemoryStats.Usage += u.MemoryStats.Usage
		all.Tasks[t.name] = &taskUsage{ResourceUsage: u, Timestamp: now.UnixNano()}
	}
	return all, nil
}

func newUsage() *resourceUsage {
	return &resourceUsage{
		CpuStats:    cpuStats{Measured: []string{"Percent", "Total Ticks"}},
		MemoryStats: memoryStats{Measured: []string{"RSS", "Usage"}},
		DeviceStats: []*deviceGroupStats{},
	}
}

// measure gives what the task uses now; nil when it does not run. The CPU's rate is
// that since the last measurement, or since the start.
func (t *taskRunner) measure(now time.Time, mhz int64) *resourceUsage {
	h := t.running()
	if h == nil {
		return nil
	}
	use, err := h.Usage()
	if err != nil {
		return nil
	}
	t.r.mu.Lock()
	began := t.local().State.StartedAt.Std()
	t.r.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stats.at.IsZero() {
		t.stats = usageSample{at: began}
	}
	if d := now.Sub(t.stats.at); d >= minSample || t.stats.cpu == 0 {
		percent := 0.0
		if d > 0 && use.CPU > t.stats.cpu {
			percent = 100 * float64(use.CPU-t.stats.cpu) / float64(d)
		}
		t.stats = usageSample{at: now, cpu: use.CPU, percent: percent}
	}
	u := newUsage()
	u.CpuStats.Percent, u.CpuStats.UserMode = t.stats.percent, t.stats.percent
	u.CpuStats.TotalTicks = t.stats.percent / 100 * float64(mhz)
	u.MemoryStats.RSS, u.MemoryStats.Usage = uint64(use.RSS), uint64(use.RSS)
	return u
}
