package swarm

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	"github.com/rxvision/rxvision/cluster"
)

// Limits and defaults.
const (
	// MaxNodes bounds a swarm.
	MaxNodes = 100_000
	// DefaultPerConn is how many nodes share a connection.
	DefaultPerConn = 200
	// DefaultStart is how long an allocation is pending.
	DefaultStart = 200 * time.Millisecond
	// DefaultWork is how long the tasks of batch jobs run.
	DefaultWork = 5 * time.Second

	// maxOpening bounds how many nodes attach at once for the first time: hosts do not
	// start all in one moment, and share no processor.
	maxOpening = 16
	maxMessage = 8 << 20
	keepAlive  = 10 * time.Second
	redial     = time.Second
)

// Profile is a kind of node.
type Profile string

// The profiles.
const (
	CPU Profile = "cpu" // 32 cores at 2.5 GHz, 128 GiB of memory
	GPU Profile = "gpu" // 96 cores, 1 TiB, eight GPUs of 80 GiB
)

// Config is what a swarm is made of. A number or duration of 0 means its default.
type Config struct {
	Count   int
	Servers []string // host:port of the servers' listeners for agents
	// DialOptions are for every connection; transport credentials are among them.
	DialOptions []grpc.DialOption
	// Identity gives more options for one node, such as its own certificate. When
	// set each node has connections of its own.
	Identity func(ctx context.Context, nodeID, name string) ([]grpc.DialOption, error)

	Prefix     string // of node names, "sim"; node IDs follow from names, so that a later swarm takes up the same nodes
	Datacenter string // dc1
	NodePool   string // default
	Profile    Profile
	PerConn    int
	Start      time.Duration // allocations are pending for it
	Work       time.Duration // tasks of batch jobs run for it
	Stop       time.Duration // tasks that are told to stop take it; 0: they end at once
	Version    string        // of the program, for show
	// Taken is called for each allocation when its node is told of it; it must be quick.
	Taken  func(*cluster.Allocation)
	Logger *slog.Logger
}

func (c *Config) defaults() error {
	c.Prefix = cmp.Or(c.Prefix, "sim")
	c.Datacenter = cmp.Or(c.Datacenter, "dc1")
	c.NodePool = cmp.Or(c.NodePool, cluster.DefaultNodePool)
	c.Profile = cmp.Or(c.Profile, CPU)
	c.PerConn = cmp.Or(c.PerConn, DefaultPerConn)
	c.Start = cmp.Or(c.Start, DefaultStart)
	c.Work = cmp.Or(c.Work, DefaultWork)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	var errs []error
	if c.Count < 1 || c.Count > MaxNodes {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to %d", c.Count, MaxNodes))
	}
	if len(c.Servers) == 0 {
		errs = append(errs, errors.New("no server is given"))
	}
	if c.Profile != CPU && c.Profile != GPU {
		errs = append(errs, fmt.Errorf("unknown profile %q: want %s or %s", c.Profile, CPU, GPU))
	}
	if c.Identity != nil {
		c.PerConn = 1
	}
	return errors.Join(errs...)
}

// Swarm is a number of simulated nodes. Make it with New, Run it once.
type Swarm struct {
	cfg     Config
	nodes   []*node
	began   time.Time
	first   uint64        // revision of what nodes say first
	opening chan struct{} // a slot per node that is on its way to its first session

	mu      sync.Mutex
	conns   map[connKey]*grpc.ClientConn
	problem error // the newest reason why a session ended
	clashes []Conflict

	attached, running, pending                    atomic.Int64
	taken, completed, reports, acked, reconnected atomic.Int64
	conflicts                                     atomic.Int64
	latency                                       histogram
}

type connKey struct {
	server string
	group  int
}

// Stats is how a swarm fares. Counts of events are since its start.
type Stats struct {
	Nodes      int           `json:"nodes"`
	Attached   int           `json:"attached"`   // nodes whose server told them what to run
	Pending    int           `json:"pending"`    // allocations not started yet
	Running    int           `json:"running"`    // allocations
	Taken      int64         `json:"taken"`      // allocations, ever
	Completed  int64         `json:"completed"`  // allocations that ended
	Reports    int64         `json:"reports"`    // reports of allocations sent
	Acked      int64         `json:"acked"`      // reports that the servers stored
	Reconnects int64         `json:"reconnects"` // sessions that broke
	Conflicts  int64         `json:"conflicts"`  // devices given twice
	AckP50     time.Duration `json:"ack_p50_ns"` // from a report to its acknowledgement
	AckP99     time.Duration `json:"ack_p99_ns"`
}

// Conflict is a device that an allocation was given while another one ran on it
// that the servers had not given up: it must never be.
type Conflict struct {
	At     time.Time `json:"at"`
	Node   string    `json:"node"`   // ID
	Device string    `json:"device"` // ID
	Holder string    `json:"holder"` // the allocation that ran
	Alloc  string    `json:"alloc"`  // the one that was started beside it
}

// maxConflicts bounds how many are kept: the oldest.
const maxConflicts = 1000

// Held is an allocation that a node has not ended.
type Held struct {
	Node     string   `json:"node"` // ID
	Alloc    string   `json:"alloc"`
	Job      string   `json:"job"`
	Status   string   `json:"status"` // pending or running
	Stopping bool     `json:"stopping,omitempty"`
	Devices  []string `json:"devices,omitempty"` // IDs
}

// View is what the nodes themselves know.
type View struct {
	Stats
	Held      []Held     `json:"held"`
	Conflicts []Conflict `json:"conflicts"` // the oldest of all times
}

// View gives all that the nodes run at present. A node's allocations are of one moment.
func (s *Swarm) View() View {
	v := View{Held: []Held{}}
	for _, n := range s.nodes {
		n.mu.Lock()
		for _, a := range n.allocs {
			if !a.over() {
				v.Held = append(v.Held, Held{
					Node: n.record.ID, Alloc: a.ID, Job: a.JobID, Status: a.status, Stopping: a.stopping, Devices: slices.Collect(a.devices()),
				})
			}
		}
		n.mu.Unlock()
	}
	v.Stats = s.Stats()
	s.mu.Lock()
	defer s.mu.Unlock()
	v.Conflicts = append([]Conflict{}, s.clashes...)
	return v
}

func (s *Swarm) conflict(c Conflict) {
	s.conflicts.Add(1)
	s.cfg.Logger.Error("a device was given twice", "node", c.Node, "device", c.Device, "holder", c.Holder, "alloc", c.Alloc)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.clashes) < maxConflicts {
		s.clashes = append(s.clashes, c)
	}
}

// New makes a swarm.
func New(cfg Config) (*Swarm, error) {
	if err := cfg.defaults(); err != nil {
		return nil, fmt.Errorf("swarm: %w", err)
	}
	s := &Swarm{cfg: cfg, conns: map[connKey]*grpc.ClientConn{}, opening: make(chan struct{}, maxOpening)}
	now := time.Now() // a later swarm of the same nodes begins with higher numbers, also within a second
	s.began = now
	s.first = cluster.Revision(uint64(now.Unix()), uint32(now.Nanosecond()))
	for i := range cfg.Count {
		s.nodes = append(s.nodes, newNode(s, i))
		s.nodes[i].record.Revision = s.first
	}
	return s, nil
}

// NodeIDs are the IDs of the swarm's nodes.
func (s *Swarm) NodeIDs() []string {
	ids := make([]string, len(s.nodes))
	for i, n := range s.nodes {
		ids[i] = n.record.ID
	}
	return ids
}

// Run attaches the nodes and keeps them attached until ctx ends.
func (s *Swarm) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, n := range s.nodes {
		wg.Go(func() { n.connect(ctx) })
	}
	wg.Wait()
	var errs []error
	for _, c := range s.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Stats gives the present figures.
func (s *Swarm) Stats() Stats {
	return Stats{
		Nodes: len(s.nodes), Attached: int(s.attached.Load()), Pending: int(s.pending.Load()), Running: int(s.running.Load()),
		Taken: s.taken.Load(), Completed: s.completed.Load(), Reports: s.reports.Load(), Acked: s.acked.Load(),
		Reconnects: s.reconnected.Load(), Conflicts: s.conflicts.Load(), AckP50: s.latency.quantile(0.50), AckP99: s.latency.quantile(0.99),
	}
}

func (s *Swarm) noteError(err error) {
	s.mu.Lock()
	s.problem = err
	s.mu.Unlock()
}

// Problem is the newest reason why a node has no session, nil when none ever lost
// or lacked one.
func (s *Swarm) Problem() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problem
}

// Silence makes a node say nothing more, without an end of its stream, as a host
// that lost its network; false ends that.
func (s *Swarm) Silence(nodeID string, silent bool) {
	for _, n := range s.nodes {
		if n.record.ID == nodeID {
			n.setMute(silent)
		}
	}
}

// conn gives a node's connection to a server.
func (s *Swarm) conn(ctx context.Context, n *node, server string) (*grpc.ClientConn, error) {
	key := connKey{server, n.index / s.cfg.PerConn}
	s.mu.Lock()
	c := s.conns[key]
	s.mu.Unlock()
	if c != nil {
		return c, nil
	}
	options := append([]grpc.DialOption{
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepAlive, Timeout: keepAlive / 2, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: redial},
			MinConnectTimeout: keepAlive / 2,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	}, s.cfg.DialOptions...)
	if s.cfg.Identity != nil {
		if n.identity == nil {
			var err error
			if n.identity, err = s.cfg.Identity(ctx, n.record.ID, n.record.Name); err != nil {
				return nil, err
			}
		}
		options = append(options, n.identity...)
	}
	c, err := grpc.NewClient("passthrough:///"+server, options...)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.conns[key]; other != nil { // of a node that shares it; this one has dialled nobody yet
		return other, c.Close()
	}
	s.conns[key] = c
	return c, nil
}

// idOf derives a UUID from a name.
func idOf(name string) string {
	b := sha256.Sum256([]byte("rxvision swarm " + name))
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80 // version 8: of one's own making
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// recordOf describes a node of the profile.
func recordOf(cfg *Config, i int) *cluster.Node {
	cores, memory, disk := 32, int64(128<<10), int64(1<<20)
	if cfg.Profile == GPU {
		cores, memory, disk = 96, 1<<20, 4<<20
	}
	const mhz = 2500
	name := fmt.Sprintf("%s-%05d", cfg.Prefix, i)
	n := &cluster.Node{
		ID: idOf(name), Name: name, Datacenter: cfg.Datacenter, NodePool: cfg.NodePool, NodeClass: "simulated",
		Meta: map[string]string{}, Status: cluster.NodeStatusReady, SchedulingEligibility: cluster.NodeEligible,
		Attributes: map[string]string{
			"kernel.name": "linux", "kernel.arch": "x86_64", "cpu.arch": "amd64", "cpu.numcores": fmt.Sprint(cores),
			"cpu.frequency": fmt.Sprint(mhz), "cpu.totalcompute": fmt.Sprint(cores * mhz), "os.name": "simulated",
			"memory.totalbytes": fmt.Sprint(memory << 20), "unique.hostname": name, "unique.network.ip-address": "127.0.0.1",
			"rxvision.version": cmp.Or(cfg.Version, "simulated"), "rx.simulated": "true",
		},
		Drivers: map[string]*cluster.DriverInfo{},
		NodeResources: &cluster.NodeResources{
			Cpu:    cluster.NodeCPU{CpuShares: int64(cores * mhz), TotalCpuCores: uint16(cores)},
			Memory: cluster.NodeMemory{MemoryMB: memory}, Disk: cluster.NodeDisk{DiskMB: disk},
			Networks:       []*cluster.NetworkResource{{Mode: "host", Device: "lo", IP: "127.0.0.1", CIDR: "127.0.0.1/32", MBits: 10000}},
			MinDynamicPort: 20000, MaxDynamicPort: 32000,
		},
		ReservedResources: &cluster.NodeReservedResources{},
	}
	for _, d := range []string{"raw_exec", "exec"} {
		n.Drivers[d] = &cluster.DriverInfo{Attributes: map[string]string{}, Detected: true, Healthy: true, HealthDescription: "Healthy"}
		n.Attributes["driver."+d] = "1"
	}
	if cfg.Profile == GPU {
		group := &cluster.NodeDeviceResource{Vendor: "nvidia", Type: "gpu", Name: "Simulated 80GB", Attributes: map[string]*cluster.Attribute{}}
		mib := int64(80 << 10)
		group.Attributes["memory"] = &cluster.Attribute{Int: &mib, Unit: "MiB"}
		for g := range 8 {
			group.Instances = append(group.Instances, &cluster.NodeDevice{ID: "GPU-" + idOf(fmt.Sprint(name, g)), Healthy: true})
		}
		n.NodeResources.Devices = []*cluster.NodeDeviceResource{group}
	}
	return n
}

// around spreads a duration by a fifth, so that nodes do not act as one.
func around(d time.Duration) time.Duration { return d - d/10 + rand.N(d/5+1) }
