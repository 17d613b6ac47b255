package sim

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Timers and bounds of an agent, as the real one has them.
const (
	beatEvery   = nodeTTL / 3
	helloWait   = 6 * time.Second
	reportWait  = 50 * time.Millisecond // status changes of this time go together
	maxUnacked  = 4
	minBackoff  = 200 * time.Millisecond
	maxBackoff  = 2 * time.Second
	killTakes   = 2 * time.Second // at most
	startTakes  = time.Second     // at most
	batchTakes  = 6 * time.Second // at most
	healthTakes = 2 * time.Second // at most
)

// node is a host with its devices and its agent. What users of devices do here is
// the truth that the servers' state is measured by.
type node struct {
	w    *world
	nr   int
	addr address

	// The host.
	up   bool
	skew time.Duration
	gpus []*gpu
	cpu  int64

	// On the host's disk.
	id     string
	run    uint64 // of the agent, see cluster.Revision
	allocs map[string]*held

	// What uses devices and ports at this moment.
	users map[string]*held

	// The agent's memory.
	agentUp  bool
	life     int
	stream   *stream
	attached bool // welcomed on the stream
	stale    bool // the servers have not been told what the node has become
	heardAt  int64
	pause    time.Duration
	order    []int // servers to try

	what     uint64 // revision of what the node is
	rev      uint64 // … and of what it says of its allocations
	pending  map[string]*pendingReport
	queue    []string // the longest waiting first
	seq      uint64
	unacked  map[uint64]map[string]uint64
	flushing bool
}

type gpu struct {
	id      string
	healthy bool
	absent  bool
}

// pendingReport is the newest state of an allocation that the servers have not acknowledged.
type pendingReport struct{ rev, sent uint64 }

// held is an allocation on its node.
type held struct {
	alloc      *cluster.Allocation // as the servers sent it last
	job        *cluster.Job
	status     string
	healthy    *bool
	judged     string // the deployment for which it was
	started    int64
	finished   int64
	process    int  // counts starts; what was meant for an earlier one is dropped
	running    bool // the process
	holds      bool // devices and ports
	stopping   bool
	ended      bool
	gone       bool   // the servers no longer know it
	exit       string // how the process ended, as long as no agent has seen it
	interrupts int    // times that the host died under it
}

func newNode(w *world, nr int) *node {
	n := &node{
		w: w, nr: nr, addr: nodeAddress + address(nr), up: true, id: w.newID(), cpu: int64(w.oneOf(1000, 2000, 4000, 8000)),
		allocs: map[string]*held{}, users: map[string]*held{},
	}
	for i := range w.oneOf(0, 1, 2, 4) {
		n.gpus = append(n.gpus, &gpu{id: fmt.Sprintf("GPU-%d-%d", nr, i), healthy: true})
	}
	return n
}

func (n *node) String() string { return fmt.Sprintf("n%d", n.nr) }

// record is what the agent registers.
func (n *node) record() *cluster.Node {
	r := &cluster.Node{
		ID: n.id, Revision: n.what, Name: n.String(), Datacenter: fmt.Sprintf("dc%d", 1+n.nr%2), NodePool: cluster.DefaultNodePool,
		NodeClass: fmt.Sprintf("class%d", n.nr%3), Status: cluster.NodeStatusReady,
		Attributes: map[string]string{"kernel.name": "linux", "rack": fmt.Sprint(n.nr % 4)},
		Drivers: map[string]*cluster.DriverInfo{
			"raw_exec": {Detected: true, Healthy: true}, "onnx": {Detected: true, Healthy: true},
		},
		NodeResources: &cluster.NodeResources{
			Cpu: cluster.NodeCPU{CpuShares: n.cpu}, Memory: cluster.NodeMemory{MemoryMB: 8192}, Disk: cluster.NodeDisk{DiskMB: 20000},
			Networks:       []*cluster.NetworkResource{{Mode: "host", IP: fmt.Sprintf("10.0.0.%d", n.nr), Device: "eth0"}},
			MinDynamicPort: 20000, MaxDynamicPort: 20009,
		},
	}
	var have []*cluster.NodeDevice
	for _, g := range n.gpus {
		if !g.absent {
			have = append(have, &cluster.NodeDevice{ID: g.id, Healthy: g.healthy})
		}
	}
	if len(have) > 0 {
		r.NodeResources.Devices = []*cluster.NodeDeviceResource{{Vendor: "nvidia", Type: "gpu", Name: "H100", Instances: have}}
	}
	return r
}

// after lets the agent do something, if it lives that long.
func (n *node) after(d time.Duration, do func()) {
	life := n.life
	n.w.after(d, func() {
		if n.agentUp && n.life == life {
			do()
		}
	})
}

func (n *node) sorted() []*held {
	out := make([]*held, 0, len(n.allocs))
	for _, id := range slices.Sorted(maps.Keys(n.allocs)) {
		out = append(out, n.allocs[id])
	}
	return out
}

// startAgent starts the agent, which finds on the disk and among the processes
// what an earlier one left.
func (n *node) startAgent() {
	if !n.up || n.agentUp {
		return
	}
	n.life++
	n.run++
	n.what, n.rev = cluster.Revision(n.run, 0), cluster.Revision(n.run, 0)
	n.agentUp, n.stream, n.attached, n.pause, n.order = true, nil, false, minBackoff, nil
	n.pending, n.queue, n.unacked, n.flushing = map[string]*pendingReport{}, nil, map[uint64]map[string]uint64{}, false
	n.w.note("%s agent starts with %d allocations", n, len(n.allocs))
	for _, h := range n.sorted() {
		switch {
		case h.exit != "":
			n.exited(h)
		case h.ended:
			n.put(h)
		case h.running:
			n.put(h)
			if h.stopping {
				n.kill(h)
			} else {
				n.watchHealth(h)
			}
		case h.stopping:
			n.finish(h, cluster.AllocClientComplete)
		default: // the host died, or it had not been started yet
			n.put(h)
			n.launch(h)
		}
	}
	n.connect()
}

// connect opens a stream to the next server.
func (n *node) connect() {
	if len(n.order) == 0 {
		n.order = n.w.rnd.Perm(len(n.w.servers))
	}
	s := n.w.servers[n.order[0]]
	n.order = n.order[1:]
	if !s.up || !n.w.net.both(n.addr, s.addr) {
		n.backOff()
		return
	}
	st := &stream{n: n, s: s, life: s.life}
	n.stream, n.attached, n.heardAt, n.stale = st, false, n.w.now, false
	record := n.record()
	st.server(func() { s.hello(st, record) })
	n.after(helloWait, func() {
		if n.stream == st && !n.attached {
			n.reconnect("no welcome")
		}
	})
}

func (n *node) backOff() {
	n.after(n.pause/2+n.w.upTo(n.pause), func() {
		if n.stream == nil {
			n.connect()
		}
	})
	n.pause = min(2*n.pause, maxBackoff)
}

func (n *node) reconnect(why string) {
	if n.stream == nil || !n.agentUp {
		return
	}
	n.w.note("%s leaves %s: %s", n, n.stream.s, why)
	n.stream.broken = true
	n.stream, n.attached = nil, false
	n.backOff()
}

// welcome begins a session: all that is unacknowledged is said again.
func (n *node) welcome(st *stream) {
	n.attached, n.pause, n.heardAt = true, minBackoff, n.w.now
	n.w.note("%s is attached to %s", n, st.s)
	n.unacked = map[uint64]map[string]uint64{}
	for _, p := range n.pending { // each for itself: the order does not matter
		p.sent = 0
	}
	n.flushLater()
	if n.stale {
		n.announce()
	}
	n.beat(st)
}

func (n *node) beat(st *stream) {
	n.after(beatEvery, func() {
		if n.stream != st {
			return
		}
		if n.w.now-n.heardAt > int64(nodeTTL) {
			n.reconnect("the server does not answer")
			return
		}
		id := n.id
		st.server(func() { st.s.heartbeat(st, id) })
		n.beat(st)
	})
}

// changed tells the servers what the node is now, when it can.
func (n *node) changed() {
	n.what++
	n.announce()
}

// announce brings the newest record to the server.
func (n *node) announce() {
	st := n.stream
	if n.stale = st == nil || !n.attached; !n.stale {
		record := n.record()
		st.server(func() { st.s.register(st, record) })
	}
}

// desire makes the node run what the servers want.
func (n *node) desire(d *desired) {
	n.heardAt = n.w.now
	named := map[string]bool{}
	for i, a := range d.allocs {
		named[a.ID] = true
		n.want(a, d.jobs[i])
	}
	gone := d.gone
	if d.full {
		for _, h := range n.sorted() {
			if !named[h.alloc.ID] {
				gone = append(gone, h.alloc.ID)
			}
		}
	}
	for _, id := range gone {
		if h := n.allocs[id]; h != nil {
			n.forget(h)
		}
	}
	n.startWaiting(d.index)
}

// want takes one allocation as the servers have it.
func (n *node) want(a *cluster.Allocation, job *cluster.Job) {
	h := n.allocs[a.ID]
	switch {
	case h == nil && a.ClientTerminal():
		return
	case h == nil && a.ServerTerminal(): // ended before it came here
		h = &held{alloc: a, job: job, status: cluster.AllocClientComplete, ended: true, finished: n.w.now}
		n.allocs[a.ID] = h
		n.put(h)
		return
	case h == nil:
		h = &held{alloc: a, job: job, status: cluster.AllocClientPending}
		n.allocs[a.ID] = h
		if job == nil {
			n.w.failf("%s is to run %s (%s) of version %d, but the state keeps no such version", n, a.Name, a.ID, a.JobVersion)
			return
		}
		n.launch(h)
		return
	case a.Epoch < h.alloc.Epoch:
		return
	}
	moved := a.ClientStatus != h.status || a.Epoch != h.alloc.Epoch || a.DeploymentID != h.alloc.DeploymentID
	h.alloc, h.gone = a, false
	if job != nil {
		h.job = job
	}
	if !h.ended && a.ServerTerminal() {
		n.stop(h)
	} else if h.running {
		n.watchHealth(h)
	}
	if moved {
		n.put(h)
	}
}

// forget ends an allocation that the servers no longer know.
func (n *node) forget(h *held) {
	h.gone = true
	if h.ended {
		n.bury(h)
		return
	}
	n.stop(h)
}

func (n *node) bury(h *held) {
	delete(n.allocs, h.alloc.ID)
	n.drop(h.alloc.ID)
}

// launch starts an allocation after some preparation.
func (n *node) launch(h *held) {
	n.after(n.w.upTo(startTakes), func() { n.start(h) })
}

// resources are the whole devices and host ports that an allocation was given.
func resources(a *cluster.Allocation) (out []string) {
	r := a.AllocatedResources
	for _, name := range slices.Sorted(maps.Keys(r.Tasks)) {
		for _, d := range r.Tasks[name].Devices {
			if !d.Shared() { // the rules add up shares
				out = append(out, d.DeviceIDs...)
			}
		}
	}
	for _, p := range r.Shared.Ports {
		out = append(out, fmt.Sprintf("port %d", p.Value))
	}
	return out
}

// start starts the process, once what it needs is free.
func (n *node) start(h *held) {
	if h.running || h.exit != "" || h.ended || h.stopping || n.allocs[h.alloc.ID] != h {
		return
	}
	needs := resources(h.alloc)
	for _, id := range needs {
		if other := n.users[id]; other != nil && other != h {
			return // startWaiting has seen whether that is right; it starts when the other has ended
		}
	}
	for _, id := range needs {
		n.users[id] = h
	}
	h.holds, h.running, h.started, h.status = true, true, n.w.now, cluster.AllocClientRunning
	h.process++
	n.w.coverage.Tasks++
	n.w.note("%s starts %s %s with %s", n, h.alloc.Name, h.alloc.ID[:8], strings.Join(needs, ", "))
	n.put(h)
	n.watchHealth(h)
	n.runProcess(h)
}

// startWaiting judges what waits for a device or port. Its holder may be only one
// that the servers have given up: lost, or unknown to them. Any other they still
// count on, and what it holds they have given twice.
func (n *node) startWaiting(index uint64) {
	for _, h := range n.sorted() {
		if h.holds || h.ended || h.stopping {
			continue
		}
		for _, id := range resources(h.alloc) {
			other := n.users[id]
			if other == nil || other == h || other.gone || other.alloc.ClientTerminal() {
				continue
			}
			n.w.failf("%s on %s is given twice at index %d: to %s %s (epoch %d), while %s %s (epoch %d, wanted: %s, known as %s) uses it",
				id, n, index, h.alloc.Name, h.alloc.ID, h.alloc.Epoch,
				other.alloc.Name, other.alloc.ID, other.alloc.Epoch, other.alloc.DesiredStatus, other.alloc.ClientStatus)
		}
	}
}

// runProcess lets a process end by itself, well or not.
func (n *node) runProcess(h *held) {
	w, process := n.w, h.process
	exit, after := "", time.Duration(0)
	switch {
	case w.weather.failing > 0 && w.chance(w.weather.failing):
		exit, after = cluster.AllocClientFailed, w.upTo(3*batchTakes)
	case h.job.Finite():
		exit, after = cluster.AllocClientComplete, w.upTo(batchTakes)
	default:
		return
	}
	w.after(after, func() {
		if !h.running || h.process != process {
			return
		}
		h.running, h.exit = false, exit
		if n.agentUp {
			n.exited(h)
		}
	})
}

// exited is the agent's notice of a process that has ended.
func (n *node) exited(h *held) {
	exit := h.exit
	h.exit = ""
	if exit == cluster.AllocClientFailed && !h.stopping && n.w.chance(300) { // restarted in place
		h.status = cluster.AllocClientPending
		n.put(h)
		n.launch(h)
		return
	}
	if h.stopping {
		exit = cluster.AllocClientComplete
	}
	n.finish(h, exit)
}

// stop ends an allocation.
func (n *node) stop(h *held) {
	if h.stopping || h.ended {
		return
	}
	h.stopping = true
	if h.running {
		n.kill(h)
	} else if h.exit == "" {
		n.finish(h, cluster.AllocClientComplete)
	}
}

func (n *node) kill(h *held) {
	process := h.process
	n.w.after(n.w.upTo(killTakes), func() {
		if !h.running || h.process != process || !n.up {
			return
		}
		h.running, h.exit = false, cluster.AllocClientComplete
		if n.agentUp {
			n.exited(h)
		}
	})
}

// finish is the end of an allocation: what it held is free.
func (n *node) finish(h *held, status string) {
	h.running, h.ended, h.status, h.finished = false, true, status, n.w.now
	if h.holds {
		h.holds = false
		for _, id := range resources(h.alloc) {
			if n.users[id] == h {
				delete(n.users, id)
			}
		}
	}
	n.w.note("%s ends %s %s: %s", n, h.alloc.Name, h.alloc.ID[:8], status)
	if h.gone {
		n.bury(h)
	} else {
		n.put(h)
	}
	for _, other := range n.sorted() {
		if !other.running && !other.ended && !other.stopping && other.exit == "" {
			n.launch(other)
		}
	}
}

// watchHealth judges a running allocation for its deployment.
func (n *node) watchHealth(h *held) {
	id := h.alloc.DeploymentID
	if id == "" || h.judged == id {
		return
	}
	h.judged, h.healthy = id, nil
	process := h.process
	n.after(n.w.upTo(healthTakes), func() {
		if h.process == process && h.running && h.judged == id {
			healthy := n.w.weather.failing == 0 || !n.w.chance(n.w.weather.failing/2)
			h.healthy = &healthy
			n.put(h)
		} else if h.judged == id && h.healthy == nil {
			h.judged = "" // its next process
		}
	})
}

// crashAgent ends the agent; tasks run on.
func (n *node) crashAgent() {
	if !n.agentUp {
		return
	}
	n.w.note("%s agent dies", n)
	n.agentUp = false
	if n.stream != nil {
		n.stream.broken = true
		n.stream = nil
	}
	for _, h := range n.allocs { // each for itself: the order does not matter
		if h.healthy == nil {
			h.judged = ""
		}
	}
}

// die is the host's death: every process ends.
func (n *node) die() {
	n.crashAgent()
	n.w.note("%s dies", n)
	n.up = false
	for _, h := range n.allocs { // each for itself: the order does not matter
		h.process++
		if h.running {
			h.running = false
			h.interrupts++
			if h.interrupts > 1 && !h.ended {
				h.exit = cluster.AllocClientFailed // lost twice is failed
			}
		}
		if !h.ended {
			h.status = cluster.AllocClientPending
		}
	}
}

// comeBack starts the host; wiped, it is a new node with the same devices.
func (n *node) comeBack(wiped bool) {
	if n.up {
		return
	}
	n.up = true
	if wiped {
		n.id, n.allocs, n.users = n.w.newID(), map[string]*held{}, map[string]*held{}
	}
	n.w.note("%s comes back as %s", n, n.id[:8])
	n.startAgent()
}

// put queues the newest state of an allocation for the servers.
func (n *node) put(h *held) {
	if !n.agentUp {
		return
	}
	n.rev++
	id := h.alloc.ID
	if n.pending[id] == nil {
		n.pending[id] = &pendingReport{}
		n.queue = append(n.queue, id)
	}
	n.pending[id].rev = n.rev
	n.flushLater()
}

func (n *node) drop(id string) {
	delete(n.pending, id)
	n.queue = slices.DeleteFunc(n.queue, func(s string) bool { return s == id })
}

func (n *node) flushLater() {
	if n.flushing || len(n.queue) == 0 {
		return
	}
	n.flushing = true
	n.after(reportWait, func() {
		n.flushing = false
		n.flush()
	})
}

// flush sends what has not been sent on this stream.
func (n *node) flush() {
	st := n.stream
	if st == nil || !n.attached || len(n.unacked) >= maxUnacked {
		return
	}
	batch := map[string]uint64{}
	var records []*cluster.Allocation
	for _, id := range n.queue {
		if p := n.pending[id]; p.sent != p.rev {
			p.sent = p.rev
			batch[id] = p.rev
			records = append(records, n.said(n.allocs[id]))
		}
	}
	if records == nil {
		return
	}
	n.seq++
	n.unacked[n.seq] = batch
	seq, id := n.seq, n.id
	st.server(func() { st.s.report(st, id, seq, records) })
}

// acknowledged forgets what a report brought, unless it is newer by now.
func (n *node) acknowledged(seq uint64) {
	n.heardAt = n.w.now
	for id, rev := range n.unacked[seq] {
		if p := n.pending[id]; p != nil && p.rev == rev {
			n.drop(id)
		}
	}
	delete(n.unacked, seq)
	n.flushLater()
}

// said is the client's side of an allocation.
func (n *node) said(h *held) *cluster.Allocation {
	a := &cluster.Allocation{
		Revision: n.pending[h.alloc.ID].rev,
		ID:       h.alloc.ID, Namespace: h.alloc.Namespace, JobID: h.alloc.JobID, NodeID: n.id, Epoch: h.alloc.Epoch,
		ClientStatus: h.status, TaskStates: map[string]*cluster.TaskState{},
	}
	clock := func(t int64) cluster.Time {
		if t == 0 {
			return 0
		}
		return cluster.Time(t + int64(n.skew))
	}
	ts := &cluster.TaskState{State: cluster.TaskStatePending, StartedAt: clock(h.started), FinishedAt: clock(h.finished)}
	switch {
	case h.ended:
		ts.State, ts.Failed = cluster.TaskStateDead, h.status == cluster.AllocClientFailed
	case h.running:
		ts.State = cluster.TaskStateRunning
	}
	for name := range h.alloc.AllocatedResources.Tasks {
		a.TaskStates[name] = ts
	}
	if h.healthy != nil && h.judged == h.alloc.DeploymentID {
		a.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: h.healthy}
	}
	if s := h.alloc.Serving; s != nil && h.running {
		a.Serving = &cluster.Serving{Task: s.Task, Model: s.Model, Version: s.Version, Address: "10.0.0.1:1", Ready: true}
	}
	return a
}
