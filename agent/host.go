package agent

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hostFacts is what does not change about a host.
type hostFacts struct {
	cores      int
	mhz        int64 // of one core
	model      string
	memory     int64 // bytes
	diskTotal  int64 // bytes of the file system that holds the data folder
	diskDevice string
	mountpoint string
	kernel     string
	machine    string // uname -m
	hostname   string
	osName     string
	osVersion  string
	cgroups    string // 2, or 1 also on hybrid hosts
}

// defaultMHz is assumed of a core that does not tell.
const defaultMHz = 1000

// readHost reads /proc and /sys. What cannot be read stays zero: placement then
// finds no room, which shows on the node.
func readHost(dir string) hostFacts {
	f := hostFacts{cores: runtime.NumCPU(), mhz: coreMHz(), model: cpuModel(), memory: memoryLimit(), cgroups: "1"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		f.kernel, f.machine = unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:])
	}
	f.hostname, _ = os.Hostname()
	release := keyValues("/etc/os-release", "=")
	f.osName, f.osVersion = release["ID"], release["VERSION_ID"]
	f.diskDevice, f.mountpoint = mountOf(dir)
	if d, ok := diskUsage(dir); ok {
		f.diskTotal = int64(d.Size)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		f.cgroups = "2"
	}
	return f
}

// keyValues reads lines of KEY<sep>VALUE; values lose their quotes.
func keyValues(path, sep string) map[string]string {
	m := map[string]string{}
	f, err := os.Open(path)
	if err != nil {
		return m
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if k, v, ok := strings.Cut(sc.Text(), sep); ok {
			m[strings.TrimSpace(k)] = strings.Trim(strings.TrimSpace(v), `"`)
		}
	}
	return m
}

func readInt(path string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n
}

var ratedGHz = regexp.MustCompile(`@ *([0-9.]+) *GHz`)

// coreMHz is the rated frequency of a core; the momentary one changes and is only
// the last resort.
func coreMHz() int64 {
	for _, name := range []string{"base_frequency", "cpuinfo_max_freq"} {
		if khz := readInt("/sys/devices/system/cpu/cpu0/cpufreq/" + name); khz > 0 {
			return khz / 1000
		}
	}
	if m := ratedGHz.FindStringSubmatch(cpuModel()); m != nil {
		if ghz, err := strconv.ParseFloat(m[1], 64); err == nil {
			return int64(ghz * 1000)
		}
	}
	if mhz, err := strconv.ParseFloat(keyValues("/proc/cpuinfo", ":")["cpu MHz"], 64); err == nil && mhz >= 1 {
		return int64(mhz)
	}
	return defaultMHz
}

func cpuModel() string { return keyValues("/proc/cpuinfo", ":")["model name"] }

// memoryLimit is the host's memory, or less where a container limits it.
func memoryLimit() int64 {
	total := meminfo(keyValues("/proc/meminfo", ":"), "MemTotal")
	for _, path := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		if n := readInt(path); n > 0 && n < total {
			total = n
		}
	}
	return total
}

// meminfo reads one value of /proc/meminfo in bytes.
func meminfo(m map[string]string, key string) int64 {
	kib, _ := strconv.ParseInt(strings.TrimSuffix(m[key], " kB"), 10, 64)
	return kib << 10
}

// mountOf finds the device and mount point of the file system that holds dir.
func mountOf(dir string) (device, mountpoint string) {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", ""
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		left, right, _ := strings.Cut(sc.Text(), " - ") // proc_pid_mountinfo(5)
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 2 {
			continue
		}
		at := l[4]
		if rel, err := filepath.Rel(at, dir); err == nil && filepath.IsLocal(rel) && len(at) >= len(mountpoint) {
			device, mountpoint = r[1], at
		}
	}
	return device, mountpoint
}

// hostDiskStats has the shape of Nomad's API.
type hostDiskStats struct {
	Device            string
	Mountpoint        string
	Size              uint64
	Used              uint64
	Available         uint64
	UsedPercent       float64
	InodesUsedPercent float64
}

func diskUsage(dir string) (hostDiskStats, bool) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return hostDiskStats{}, false
	}
	block := uint64(st.Bsize)
	d := hostDiskStats{Size: st.Blocks * block, Used: (st.Blocks - st.Bfree) * block, Available: st.Bavail * block}
	if n := d.Used + d.Available; n > 0 {
		d.UsedPercent = 100 * float64(d.Used) / float64(n)
	}
	if st.Files > 0 {
		d.InodesUsedPercent = 100 * float64(st.Files-st.Ffree) / float64(st.Files)
	}
	return d, true
}

// hostCPUStats has the shape of Nomad's API; percent of one core.
type hostCPUStats struct {
	CPU          string
	User         float64
	System       float64
	Idle         float64
	TotalPercent float64
	TotalTicks   float64
}

// cpuTimes are jiffies of one core since boot.
type cpuTimes struct{ user, system, idle, total float64 }

func readCPU() map[string]cpuTimes {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return nil
	}
	defer f.Close()
	all := map[string]cpuTimes{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		w := strings.Fields(sc.Text()) // proc_stat(5): user nice system idle iowait irq softirq steal …
		if len(w) < 8 || !strings.HasPrefix(w[0], "cpu") || w[0] == "cpu" {
			continue
		}
		var n [8]float64
		for i := range n {
			if i+1 < len(w) {
				n[i], _ = strconv.ParseFloat(w[i+1], 64)
			}
		}
		t := cpuTimes{user: n[0] + n[1], system: n[2] + n[5] + n[6], idle: n[3] + n[4]}
		t.total = t.user + t.system + t.idle + n[7]
		all[w[0]] = t
	}
	return all
}

// minSample is the shortest time over which use is measured; asked again sooner,
// the last answer is given.
const minSample = time.Second

// cpuSampler measures the host's CPUs between calls.
type cpuSampler struct {
	mu   sync.Mutex
	at   time.Time
	base map[string]cpuTimes
	last []hostCPUStats
}

func newCPUSampler() *cpuSampler { return &cpuSampler{at: time.Now(), base: readCPU()} }

func (s *cpuSampler) sample(mhz int64) []hostCPUStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last != nil && time.Since(s.at) < minSample {
		return s.last
	}
	now := readCPU()
	s.last = nil
	for i := range len(now) {
		name := "cpu" + strconv.Itoa(i)
		a, b := s.base[name], now[name]
		c := hostCPUStats{CPU: name}
		if d := b.total - a.total; d > 0 {
			c.User, c.System, c.Idle = 100*(b.user-a.user)/d, 100*(b.system-a.system)/d, 100*(b.idle-a.idle)/d
			c.TotalPercent = max(0, 100-c.Idle)
			c.TotalTicks = c.TotalPercent / 100 * float64(mhz)
		}
		s.last = append(s.last, c)
	}
	s.at, s.base = time.Now(), now
	return s.last
}

// uptime is since the host was booted.
func uptime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func itoa(n uint64) string { return strconv.FormatUint(n, 10) }
