package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/agent/spot"
	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
)

const goArch = runtime.GOARCH

// Defaults of Config.
const (
	DefaultDatacenter = "dc1"
	DefaultRegion     = "global"
	DefaultAddress    = "127.0.0.1"
	DefaultHTTPAddr   = "127.0.0.1:7656"
	DefaultCacheBytes = 32 << 30
	// DefaultCgroup is the group below the cgroup v2 mount that tasks live in.
	DefaultCgroup = "rxvision.slice"
	// DefaultKeepAllocs is how many allocations that have ended keep their directories.
	DefaultKeepAllocs = 50
)

// How often what has no event of its own is looked at.
const (
	inventoryEvery = 30 * time.Second
	watchRetry     = 10 * time.Second
)

// Config is what an agent is made of. Empty fields take the defaults above.
type Config struct {
	DataDir  string   // holds state.db, artifacts/, alloc/ and run/; one agent at a time
	Servers  []string // host:port of the servers' gRPC listeners
	HTTPAddr string   // of /metrics and /health; "none" for no listener

	Name       string // of the node; the host's name
	Region     string
	Datacenter string
	NodePool   string
	NodeClass  string
	Meta       map[string]string
	Address    string // IP that tasks' ports are bound to and advertised at
	Interface  string // its network device, for show
	Version    string // of the program, for show

	ReservedCPU      int64 // MHz kept back from placement
	ReservedMemoryMB int64
	ReservedDiskMB   int64

	RawExec          bool     // enable raw_exec
	Cgroup           string   // "none": no cgroups
	Hidden           []string // directories beside DataDir that exec tasks do not see
	Executable       string   // of workers; "": this program
	WorkerEnv        []string // more environment of workers, NAME=value
	ORTLibrary       string   // ONNX Runtime library for workers
	CacheBytes       int64    // bound of the artifact cache
	MaxArtifactBytes int64    // bound of one job artifact; 0: task.DefaultMaxArtifact
	KeepAllocs       int
	// StopTasksOnExit ends all tasks when Run's context ends; the next agent starts
	// them again. By default they run on.
	StopTasksOnExit bool

	Spot    bool          // the machine may be taken away at short notice
	Notices spot.Provider // of that, nil: nobody is asked

	// HealthCheckCommand is run, with one device visible, before a device that has failed
	// is given to work again; its end with 0 is one condition. Empty: NVML alone decides.
	HealthCheckCommand []string
	SelfTestAfter      time.Duration // DefaultSelfTestAfter

	// Identity opens the holder of the node's certificate; with it all of the wire is
	// mTLS, and workers get certificates too. Nil: plain text.
	Identity func(nodeID, name string) (*pki.Holder, error)

	GPUs        gpu.Source        // nil: NVML, or none
	DialOptions []grpc.DialOption // added to every connection: TLS, keep-alive
	Log         *slog.Logger
	Metrics     *prometheus.Registry // nil: one of its own

	// Drivers may replace or add drivers, in tests.
	Drivers func(*task.Drivers)
}

// Agent owns one host. Make it with New, then Run it once.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	store     *store
	cache     *blob.Cache
	gpus      gpu.Source
	drivers   *task.Drivers
	artifacts *task.Artifacts
	updates   *updates
	host      hostFacts
	cpu       *cpuSampler
	metrics   *metrics
	listener  net.Listener
	nodeID    string
	holder    *pki.Holder // of the node's certificate, nil without TLS
	allocRoot string

	nodeChanged chan struct{} // capacity 1
	faulty      chan struct{} // capacity 1: the faults of devices have changed
	faults      deviceFaults
	spot        bool
	certified   chan struct{} // capacity 1: a worker began with a certificate

	mu           sync.Mutex
	node         *cluster.Node
	runners      map[string]*runner
	client       pb.FleetClient // of the stream that is up, nil when none is
	conns        map[string]*grpc.ClientConn
	warned       map[string]bool
	pulse        pulse
	interruption *cluster.Interruption // that is announced, nil for none
	reintroduced time.Time             // when the node last tried to enrol again; of connect's goroutine

	told     map[string]told // by allocation, as servers named them and as it is stored
	timeline string          // of told, as servers name it; "": told may lack some

	runCtx     context.Context // what runners live by
	suspend    context.Context // ends when tasks shall end with the agent
	suspendNow context.CancelFunc
	wg         sync.WaitGroup // of the runners
}

func (c *Config) defaults() error {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	set(&c.HTTPAddr, DefaultHTTPAddr)
	set(&c.Region, DefaultRegion)
	set(&c.Datacenter, DefaultDatacenter)
	set(&c.NodePool, cluster.DefaultNodePool)
	set(&c.Address, DefaultAddress)
	set(&c.Cgroup, DefaultCgroup)
	if c.Cgroup == "none" {
		c.Cgroup = ""
	}
	if c.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("no node name given and none to be had: %w", err)
		}
		c.Name = name
	}
	if c.CacheBytes == 0 {
		c.CacheBytes = DefaultCacheBytes
	}
	if c.SelfTestAfter == 0 {
		c.SelfTestAfter = DefaultSelfTestAfter
	}
	if c.KeepAllocs == 0 {
		c.KeepAllocs = DefaultKeepAllocs
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	var errs []error
	if c.DataDir == "" {
		errs = append(errs, errors.New("no data folder given (DataDir)"))
	}
	dir, err := filepath.Abs(c.DataDir)
	c.DataDir, errs = dir, append(errs, err)
	if len(c.Servers) == 0 {
		errs = append(errs, errors.New("no server given (Servers)"))
	}
	if net.ParseIP(c.Address) == nil {
		errs = append(errs, fmt.Errorf("address %q is not an IP address", c.Address))
	}
	return errors.Join(errs...)
}

// New opens the data folder, probes the host and listens on HTTPAddr. An error
// says what cannot be had: a data folder in use, a port that is taken.
func New(ctx context.Context, cfg Config) (_ *Agent, err error) {
	if err := cfg.defaults(); err != nil {
		return nil, fmt.Errorf("agent configuration: %w", err)
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, gpus: cfg.GPUs, cpu: newCPUSampler(),
		allocRoot: filepath.Join(cfg.DataDir, "alloc"), nodeChanged: make(chan struct{}, 1), certified: make(chan struct{}, 1),
		runners: map[string]*runner{}, conns: map[string]*grpc.ClientConn{}, warned: map[string]bool{},
		told: map[string]told{}, faulty: make(chan struct{}, 1),
	}
	a.suspend, a.suspendNow = context.WithCancel(context.Background())
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	a.artifacts = &task.Artifacts{MaxBytes: cfg.MaxArtifactBytes, AllowFile: cfg.RawExec, Client: &http.Client{Transport: transport}}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	for _, dir := range []string{cfg.DataDir, a.allocRoot} {
		if err := os.MkdirAll(dir, 0o711); err != nil { // tasks of other users find their way to their directories
			return nil, fmt.Errorf("agent data folder: %w", err)
		}
	}
	if a.store, err = openStore(filepath.Join(cfg.DataDir, "state.db")); err != nil {
		return nil, err
	}
	if a.nodeID, err = a.store.nodeID(); err != nil {
		return nil, err
	}
	run, err := a.store.nextRun(time.Now())
	if err != nil {
		return nil, err
	}
	first := cluster.Revision(run, 0)
	a.updates = newUpdates(first)
	a.log = a.log.With("node", a.nodeID)
	var workers task.WorkerTLS
	if cfg.Identity != nil {
		if a.holder, err = cfg.Identity(a.nodeID, cfg.Name); err != nil {
			return nil, err
		}
		workers = workerTLS{a}
	}
	if a.cache, err = blob.OpenCache(filepath.Join(cfg.DataDir, "artifacts"), cfg.CacheBytes, a.log, cfg.Metrics); err != nil {
		return nil, err
	}
	if a.gpus == nil {
		if a.gpus, err = gpu.Open(gpu.Options{}); err != nil {
			a.log.Info("this is a CPU-only node", "reason", err)
		}
	}
	if err = a.restoreFaults(); err != nil {
		return nil, err
	}
	if err = a.learnSpot(ctx); err != nil {
		return nil, err
	}
	a.drivers = task.NewDrivers(ctx, task.Options{
		RawExec: cfg.RawExec, CgroupParent: cfg.Cgroup, Hidden: append([]string{cfg.DataDir}, cfg.Hidden...),
		Executable: cfg.Executable, WorkerEnv: cfg.WorkerEnv, ORTLibrary: cfg.ORTLibrary,
		Cache: a.cache, Fetch: a.fetch, WorkerTLS: workers,
	})
	if cfg.Drivers != nil {
		cfg.Drivers(a.drivers)
	}
	a.host = readHost(cfg.DataDir)
	a.node = a.fingerprint()
	a.node.Revision = first
	if a.metrics, err = a.newMetrics(cfg.Metrics); err != nil {
		return nil, err
	}
	if cfg.HTTPAddr != "none" {
		if a.listener, err = net.Listen("tcp", cfg.HTTPAddr); err != nil {
			return nil, fmt.Errorf("agent HTTP address %s: %w (choose another one)", cfg.HTTPAddr, err)
		}
	}
	return a, nil
}

// NodeID is the node's identity, the same for the life of the data folder.
func (a *Agent) NodeID() string { return a.nodeID }

// HTTPAddr is where /metrics and /health are, "" when there is no listener.
func (a *Agent) HTTPAddr() string {
	if a.listener == nil {
		return ""
	}
	return a.listener.Addr().String()
}

// Run takes over what an earlier agent left running and serves until ctx ends.
// Then the tasks run on, unless Config.StopTasksOnExit. It closes the agent.
func (a *Agent) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	runners, letGo := context.WithCancel(context.Background())
	a.runCtx = runners
	err := a.restore()
	if err == nil {
		background, stop := context.WithCancel(ctx)
		if a.listener != nil {
			wg.Go(func() { a.serveHTTP(background) })
		}
		wg.Go(func() { a.watchGPUs(background) })
		wg.Go(func() { a.testDevices(background) })
		if a.cfg.Notices != nil {
			wg.Go(func() { a.watchNotices(background) })
		}
		wg.Go(func() { a.collectGarbage(background) })
		if a.holder != nil {
			wg.Go(func() { _ = a.holder.Run(background) }) // gives no errors
			wg.Go(func() { a.keepWorkersCertified(background) })
		}
		streaming, stopStream := context.WithCancel(context.Background())
		wg.Go(func() { a.connect(streaming) })
		<-ctx.Done()
		if a.cfg.StopTasksOnExit {
			a.suspendAll()
		}
		stopStream()
		stop()
	}
	wg.Wait() // the stream starts runners
	letGo()
	a.wg.Wait()
	return errors.Join(err, a.close())
}

// suspendAll ends every task, to start again with the next agent, and gives the
// stream a moment to say so.
func (a *Agent) suspendAll() {
	a.mu.Lock()
	a.suspendNow()
	var all []*runner
	for _, r := range a.runners {
		all = append(all, r)
	}
	a.mu.Unlock()
	for _, r := range all {
		<-r.done
	}
	deadline := time.Now().Add(farewell)
	for a.updates.waiting() > 0 && time.Now().Before(deadline) && a.isConnected() {
		time.Sleep(10 * time.Millisecond)
	}
}

// farewell bounds the wait for the last status to be acknowledged.
const farewell = 2 * time.Second

func (a *Agent) isConnected() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.client != nil
}

// close lets go of everything that New took.
func (a *Agent) close() error {
	a.suspendNow()
	var errs []error
	if a.listener != nil {
		if err := a.listener.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, c := range a.conns {
		errs = append(errs, c.Close())
	}
	if a.gpus != nil {
		errs = append(errs, a.gpus.Close())
	}
	if a.cache != nil {
		errs = append(errs, a.cache.Close())
	}
	if a.store != nil {
		errs = append(errs, a.store.close())
	}
	return errors.Join(errs...)
}

// statusDir is where the supervisors of an allocation's tasks leave their exit status.
func (a *Agent) statusDir(allocID string) string { return filepath.Join(a.cfg.DataDir, "run", allocID) }

// restore makes runners of what the store holds.
func (a *Agent) restore() error {
	all, err := a.store.load()
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range all {
		job, err := a.store.job(x.alloc.JobKey(), x.alloc.JobVersion)
		if err != nil {
			return err
		}
		a.launch(a.newRunner(x.alloc, job, x.local))
	}
	return nil
}

// launch starts a runner. Caller holds mu.
func (a *Agent) launch(r *runner) {
	a.runners[r.id] = r
	if r.alloc.ServerTerminal() || r.local.Gone {
		r.requestStop()
	}
	a.wg.Go(func() {
		r.run(a.runCtx)
		if r.isDone() {
			a.bury(r)
		}
	})
}

// bury forgets an allocation that has ended and that the servers do not know any more.
func (a *Agent) bury(r *runner) {
	r.mu.Lock()
	gone := r.local.Gone
	r.mu.Unlock()
	if !gone {
		return
	}
	if err := r.collect(); err != nil {
		r.log.Warn("the directory of an allocation could not be removed", "error", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.runners[r.id] != r {
		return
	}
	if err := a.store.saveDesired(nil, nil, []string{r.id}); err != nil {
		r.log.Error("an allocation could not be forgotten", "error", err)
		return
	}
	delete(a.runners, r.id)
	a.updates.drop(r.id)
}

// runner finds an allocation; nil when it is not here.
func (a *Agent) runner(id string) *runner {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.runners[id]
}

// warnOnce logs a text the first time that it comes.
func (a *Agent) warnOnce(text string) {
	a.mu.Lock()
	known := a.warned[text]
	if len(a.warned) < 100 {
		a.warned[text] = true
	}
	a.mu.Unlock()
	if !known {
		a.log.Warn("GPUs tell less than usual", "reason", text)
	}
}

// watchGPUs keeps the node record true to the GPUs' health and layout.
func (a *Agent) watchGPUs(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for ctx.Err() == nil {
			err := a.gpus.Watch(ctx, func(e gpu.Event) {
				a.log.Warn("GPU health", "device", e.UUID, "healthy", e.Healthy, "reason", e.Reason, "xid", e.XID)
				a.refreshNode()
				if !e.Healthy {
					a.tellTasks(e)
				}
			})
			if err != nil {
				a.log.Error("GPU health cannot be watched", "error", err, "retry_in", watchRetry)
			}
			select {
			case <-time.After(watchRetry):
			case <-ctx.Done():
			}
		}
	})
	tick := time.NewTicker(inventoryEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.refreshNode()
		case <-ctx.Done():
			return
		}
	}
}
