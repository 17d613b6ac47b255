package task

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/proc"
)

// The drivers' names, as a job's `driver` gives them.
const (
	DriverRawExec = "raw_exec"
	DriverExec    = "exec"
	DriverONNX    = "onnx"
)

// Driver starts tasks of one kind. Its methods may be called concurrently.
type Driver interface {
	// Fingerprint says whether the driver works on this node, and why not.
	Fingerprint() *cluster.DriverInfo

	// Start starts the task and returns once its program runs. It calls c.Keep
	// before and after, so that a successor of the agent that dies in between
	// still finds the process. ctx bounds the preparation only.
	Start(ctx context.Context, c *Config) (Handle, error)

	// Recover takes over a task from the last State that Keep was given. If it has
	// ended meanwhile, the Handle is done and has its exit status. ErrNotStarted:
	// there never was a process.
	Recover(ctx context.Context, s State) (Handle, error)
}

// ErrNotStarted says that a kept State stands for a start that did not happen.
var ErrNotStarted = errors.New("the task was never started")

// transient marks the error of a start that may succeed when tried again.
type transient struct{ error }

func (t transient) Unwrap() error { return t.error }

// Transient reports whether a start that failed with err may succeed when tried
// again: what it needs could not be had now.
func Transient(err error) bool {
	var t transient
	return errors.As(err, &t)
}

// Handle is one run of a task. Its methods may be called concurrently.
type Handle interface {
	// State is the newest that Keep was given.
	State() State
	// Done is closed when the task has ended and what it held is cleared up.
	Done() <-chan struct{}
	// Exit says how it ended; only after Done.
	Exit() Exit
	// Signal sends a signal to the task's program; os.ErrProcessDone when it has ended.
	Signal(sig syscall.Signal) error
	// Stop sends sig, waits for the grace period (cut short by ctx), then kills. It
	// returns when the task has ended; an error means that it could not be ended.
	Stop(ctx context.Context, sig syscall.Signal, grace time.Duration) error
	// Usage measures the task now; os.ErrProcessDone when it has ended.
	Usage() (Usage, error)
	// Detach lets go of the task, which runs on. It must be called once for every
	// Handle, ended or not, and waits for what the Handle has running.
	Detach()
}

// Exit says how a task ended.
type Exit = proc.ExitStatus

// Usage is what a task uses now (RSS, Processes) and has used so far (CPU).
type Usage = proc.Usage

// State is what to keep of a run to take it over again. It is stored as JSON, so
// fields are only ever added.
type State struct {
	Driver   string
	Identity proc.Identity // only Cgroup and StatusFile before the start
	AllocID  string
	Task     string
	Digest   string `json:",omitempty"` // onnx: the artifact in use
	Size     int64  `json:",omitempty"`
	Address  string `json:",omitempty"` // onnx: where the worker listens, host:port
	TLS      bool   `json:",omitempty"` // onnx: … by TLS
}

// Config is one start of a task.
type Config struct {
	Alloc      *cluster.Allocation
	Task       *cluster.Task
	Dir        Dir
	Env        *Env
	StatusFile string            // absolute path, new for each start
	Keep       func(State) error // stores the State durably
	Notice     func(text string) // tells the user what is going on; may be nil
}

func (c *Config) notice(format string, args ...any) {
	if c.Notice != nil {
		c.Notice(fmt.Sprintf(format, args...))
	}
}

// Options configure the drivers of a node.
type Options struct {
	RawExec      bool        // enable raw_exec
	CgroupParent string      // group for tasks below the cgroup v2 mount; "" for none
	Hidden       []string    // directories that exec tasks see empty, but for their own
	Executable   string      // the rxvision binary for workers; "": this program's own
	WorkerEnv    []string    // extra environment of workers, NAME=value
	ORTLibrary   string      // path of the ONNX Runtime library for workers
	Cache        *blob.Cache // for models
	Fetch        blob.Fetch
	WorkerTLS    WorkerTLS // nil: workers speak plain text
}

// WorkerTLS gives workers their certificates.
type WorkerTLS interface {
	// Certify makes sure that dir, which belongs to the worker's user, holds a key and
	// a valid certificate of an allocation's worker, and gives the arguments by which
	// the worker finds them.
	Certify(ctx context.Context, allocID, dir string) (args []string, err error)
}

// Drivers are the drivers of a node with what the host allows them.
type Drivers struct {
	opts   Options
	host   proc.Capabilities
	byName map[string]Driver
}

// NewDrivers probes the host, which takes about a tenth of a second, and makes
// the drivers.
func NewDrivers(ctx context.Context, o Options) *Drivers {
	d := &Drivers{opts: o, host: proc.Probe(ctx, o.CgroupParent), byName: map[string]Driver{}}
	d.Add(DriverRawExec, &rawExec{d})
	d.Add(DriverExec, &isolatedExec{d})
	d.Add(DriverONNX, &onnx{d})
	return d
}

// Add adds a driver or replaces one. Not to be called once tasks run.
func (d *Drivers) Add(name string, driver Driver) { d.byName[name] = driver }

// Get finds a driver by name.
func (d *Drivers) Get(name string) (Driver, error) {
	driver := d.byName[name]
	if driver == nil {
		return nil, fmt.Errorf("driver %q is not on this node", name)
	}
	return driver, nil
}

// Fingerprints gives the drivers' state by name, and node attributes: driver.NAME
// for those that work, and rx.reattach, rx.limits and rx.isolation with the
// reason where the host does not allow them.
func (d *Drivers) Fingerprints() (map[string]*cluster.DriverInfo, map[string]string) {
	infos, attrs := map[string]*cluster.DriverInfo{}, map[string]string{}
	for name, driver := range d.byName {
		info := driver.Fingerprint()
		if info.Detected && info.Healthy {
			attrs["driver."+name] = "1"
		}
		infos[name] = info
	}
	for name, can := range map[string]struct {
		ok     bool
		reason string
	}{
		"rx.reattach":  {d.host.Reattach, d.host.ReattachReason},
		"rx.limits":    {d.host.Limits, d.host.LimitsReason},
		"rx.isolation": {d.host.Isolation, d.host.IsolateReason},
	} {
		attrs[name] = fmt.Sprint(can.ok)
		if can.reason != "" {
			attrs[name+".reason"] = can.reason
		}
	}
	return infos, attrs
}

// healthy describes a working driver, with a note when nothing limits its tasks.
func (d *Drivers) healthy(name string) *cluster.DriverInfo {
	info := &cluster.DriverInfo{
		Detected: true, Healthy: true, HealthDescription: "Healthy",
		Attributes: map[string]string{"driver." + name: "true"},
	}
	if !d.host.Limits {
		info.HealthDescription = "Healthy, but CPU and memory limits are not enforced: " + d.host.LimitsReason
	}
	return info
}

func undetected(reason string) *cluster.DriverInfo {
	return &cluster.DriverInfo{HealthDescription: reason, Attributes: map[string]string{}}
}

// spec is what all drivers' processes have in common: directory, environment,
// logs, user, cgroup and limits.
func (d *Drivers) spec(c *Config, path string, args []string) proc.Spec {
	s := proc.Spec{
		Path: path, Args: args, Env: c.Env.List(), Dir: c.Dir.Root(),
		StatusFile: c.StatusFile, User: c.Task.User,
	}
	if lc := c.Task.LogConfig; lc == nil || !lc.Disabled {
		files, size := proc.DefaultLogFiles, int64(proc.DefaultLogBytes)
		if lc != nil && lc.MaxFiles > 0 {
			files = lc.MaxFiles
		}
		if lc != nil && lc.MaxFileSizeMB > 0 {
			size = int64(lc.MaxFileSizeMB) << 20
		}
		log := func(stream string) proc.LogFiles {
			return proc.LogFiles{Dir: c.Dir.Logs(), Name: c.Task.Name + "." + stream, MaxFiles: files, MaxBytes: size}
		}
		s.Stdout, s.Stderr = log("stdout"), log("stderr")
	}
	s.Cgroup = d.cgroup(c.Alloc.ID, c.Task.Name)
	if s.Cgroup != "" && d.host.Limits && c.Alloc.AllocatedResources != nil {
		if t := c.Alloc.AllocatedResources.Tasks[c.Task.Name]; t != nil {
			s.Limits = proc.Limits{
				MemoryBytes: max(t.Memory.MemoryMB, t.Memory.MemoryMaxMB) << 20,
				CPUShares:   t.Cpu.CpuShares,
			}
		}
	}
	return s
}

func (d *Drivers) cgroup(allocID, task string) string {
	if d.host.CgroupParent == "" {
		return ""
	}
	return d.host.CgroupParent + "/" + allocID + "." + strings.Map(func(r rune) rune {
		if r <= ' ' || r == 0x7f {
			return '_'
		}
		return r
	}, task)
}

// ParseSignal reads a signal's name, with or without SIG, in any case; "" gives
// fallback.
func ParseSignal(name string, fallback syscall.Signal) (syscall.Signal, error) {
	if name == "" {
		return fallback, nil
	}
	full := strings.ToUpper(name)
	if !strings.HasPrefix(full, "SIG") {
		full = "SIG" + full
	}
	if s := unix.SignalNum(full); s != 0 {
		return s, nil
	}
	return 0, fmt.Errorf("signal %q is not known", name)
}

// StopSignal is the signal that asks a task to end: its KillSignal, or the
// driver's own default.
func StopSignal(t *cluster.Task) (syscall.Signal, error) {
	fallback := syscall.SIGINT // as Nomad's exec drivers
	if t.Driver == DriverONNX {
		fallback = syscall.SIGTERM // the worker then drains
	}
	return ParseSignal(t.KillSignal, fallback)
}
