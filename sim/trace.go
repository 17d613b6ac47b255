package sim

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// Trace is a cluster with the pods that were asked of it, in the columns of Alibaba's
// cluster-trace-gpu-v2023 (https://github.com/alibaba/clusterdata).
type Trace struct {
	Nodes []TraceNode
	Pods  []TracePod // by name
}

// TraceNode is a line of the node list.
type TraceNode struct {
	Name   string
	CPU    int64 // thousandths of a core
	Memory int64 // MiB
	GPUs   int64
	Model  string // of all its GPUs
}

// TracePod is a line of the pod list: it asks for whole GPUs, for thousandths of one, or for none.
type TracePod struct {
	Name   string
	CPU    int64 // thousandths of a core
	Memory int64 // MiB
	GPUs   int64
	Milli  int64    // of each GPU
	Models []string // any of these; none: any at all

	QoS              string // LS, Burstable, BE…; "" where the list does not tell
	Created, Deleted int64  // seconds; 0 where the list does not tell
}

// Demand is what the pod asks of GPUs, in thousandths.
func (p *TracePod) Demand() int64 { return p.GPUs * p.Milli }

// ReadTrace reads both lists. The error tells all faults, by line.
func ReadTrace(nodes, pods io.Reader) (*Trace, error) {
	t := &Trace{}
	err := readTable("nodes", nodes, []string{"sn", "cpu_milli", "memory_mib", "gpu", "model"}, func(r *traceRow) {
		n := TraceNode{Name: r.text("sn"), CPU: r.number("cpu_milli"), Memory: r.number("memory_mib"), GPUs: r.number("gpu"), Model: r.text("model")}
		if n.GPUs > 64 {
			r.fault("%d GPUs; a node has 64 at most", n.GPUs)
		}
		t.Nodes = append(t.Nodes, n)
	})
	err = errors.Join(err, readTable("pods", pods, []string{"name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli"}, func(r *traceRow) {
		p := TracePod{Name: r.text("name"), CPU: r.number("cpu_milli"), Memory: r.number("memory_mib"), GPUs: r.number("num_gpu"), Milli: r.number("gpu_milli")}
		if spec := r.text("gpu_spec"); spec != "" {
			p.Models = strings.Split(spec, "|")
		}
		if p.QoS = r.text("qos"); r.text("creation_time") != "" && r.text("deletion_time") != "" {
			p.Created, p.Deleted = r.number("creation_time"), r.number("deletion_time")
		}
		switch {
		case p.GPUs == 0 && p.Milli != 0, p.GPUs > 0 && (p.Milli < 1 || p.Milli > cluster.WholeMilli), p.GPUs > 1 && p.Milli != cluster.WholeMilli:
			r.fault("%d GPUs of %d thousandths: a pod asks for whole GPUs, for 1 to 1000 thousandths of one, or for none", p.GPUs, p.Milli)
		}
		t.Pods = append(t.Pods, p)
	}))
	if err == nil && (len(t.Nodes) == 0 || t.Capacity() == 0) {
		err = errors.New("nodes: no GPU in the list")
	}
	if err == nil && !slices.ContainsFunc(t.Pods, func(p TracePod) bool { return p.GPUs > 0 }) {
		err = errors.New("pods: none asks for a GPU")
	}
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(t.Pods, func(a, b TracePod) int { return strings.Compare(a.Name, b.Name) })
	return t, nil
}

// traceRow is a line of a list; it gathers faults.
type traceRow struct {
	file   string
	line   int
	at     map[string]int
	fields []string
	faults error
}

func (r *traceRow) fault(format string, args ...any) {
	r.faults = errors.Join(r.faults, fmt.Errorf("%s, line %d: %s", r.file, r.line, fmt.Sprintf(format, args...)))
}

// text is a column's, "" where there is none.
func (r *traceRow) text(column string) string {
	if i, is := r.at[column]; is {
		return r.fields[i]
	}
	return ""
}

func (r *traceRow) number(column string) int64 {
	n, err := strconv.ParseInt(r.text(column), 10, 64)
	if err != nil || n < 0 || n > 1<<40 {
		r.fault("%s is %q, not a number from 0", column, r.text(column))
	}
	return n
}

func readTable(file string, from io.Reader, columns []string, row func(*traceRow)) error {
	in := csv.NewReader(from)
	in.ReuseRecord = true
	head, err := in.Read()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	r := &traceRow{file: file, at: map[string]int{}}
	for i, c := range head {
		r.at[c] = i
	}
	for _, c := range columns {
		if _, is := r.at[c]; !is {
			r.faults = errors.Join(r.faults, fmt.Errorf("%s: there is no column %s", file, c))
		}
	}
	if r.faults != nil {
		return r.faults
	}
	for {
		if r.fields, err = in.Read(); err != nil {
			if !errors.Is(err, io.EOF) {
				r.faults = errors.Join(r.faults, fmt.Errorf("%s: %w", file, err))
			}
			break
		}
		r.line, _ = in.FieldPos(0)
		r.fields = slices.Clone(r.fields)
		row(r)
	}
	return r.faults
}

// Capacity is what GPUs the nodes have, in thousandths.
func (t *Trace) Capacity() (milli int64) {
	for _, n := range t.Nodes {
		milli += n.GPUs * cluster.WholeMilli
	}
	return milli
}

// Arrivals orders the pods by a seed: shuffled, then further ones drawn, or some left out,
// until the GPUs asked for are at least so many percent of the capacity.
func (t *Trace) Arrivals(seed uint64, percent int64) []*TracePod {
	rnd := rand.New(rand.NewPCG(seed, 0x0b))
	out := make([]*TracePod, len(t.Pods))
	total := int64(0)
	for i := range t.Pods {
		out[i] = &t.Pods[i]
		total += out[i].Demand()
	}
	rnd.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	want := t.Capacity() * percent / 100
	for total < want {
		p := &t.Pods[rnd.IntN(len(t.Pods))]
		out, total = append(out, p), total+p.Demand()
	}
	for last := len(out) - 1; total-out[last].Demand() >= want; last = len(out) - 1 { // a shuffled list: its end is random
		total -= out[last].Demand()
		out = out[:last]
	}
	return out
}

// Replay is what became of a trace: the GPUs that were allocated, in percent of the capacity, when
// those asked for had come to 1, 2, 3… percent.
type Replay struct {
	Allocated []float64
	Placed    int
	Failed    int
	Moves     int // of pods that had been placed
}

// At gives the allocation when the pods had asked for so many percent of the capacity.
func (r *Replay) At(percent int) float64 { return r.Allocated[min(percent, len(r.Allocated)-1)] }

// Ceiling is what could be allocated at best of the pods that have asked for so many percent of the capacity, in percent of it.
type Ceiling struct {
	Room   float64 // if processors, memory and GPUs lay in one heap: what they suffice for
	Shares float64 // if all shares were placed, packed anew into GPUs, the largest first: what they leave of no GPU
}

// Ceiling is that of the order of a seed. Shares is exceeded only by who turns shares away that would fit.
func (t *Trace) Ceiling(seed uint64, percent int64) Ceiling {
	cpu, memory := int64(0), int64(0)
	for _, n := range t.Nodes {
		cpu, memory = cpu+n.CPU, memory+n.Memory
	}
	pods, capacity := []*TracePod{}, t.Capacity()
	asked := int64(0)
	for _, p := range t.Arrivals(seed, replayPercent) {
		if asked*100 >= capacity*percent {
			break
		}
		if asked += p.Demand(); p.GPUs > 0 {
			pods = append(pods, p)
		}
	}
	most := func(room int64, part func(*TracePod) int64) int64 { // GPUs, if those that need least of it for each came first
		slices.SortFunc(pods, func(a, b *TracePod) int { return cmp.Compare(part(a)*b.Demand(), part(b)*a.Demand()) })
		milli := int64(0)
		for _, p := range pods {
			if room -= part(p); room < 0 {
				return milli + p.Demand()
			}
			milli += p.Demand()
		}
		return milli
	}
	room := min(asked, capacity, most(cpu, func(p *TracePod) int64 { return p.CPU }), most(memory, func(p *TracePod) int64 { return p.Memory }))
	slices.SortFunc(pods, func(a, b *TracePod) int { return cmp.Compare(b.Milli, a.Milli) })
	left, idle := map[int64]int64{}, int64(0) // GPUs by what is free of them
	for _, p := range pods {
		if p.Milli == cluster.WholeMilli {
			continue
		}
		best := int64(cluster.WholeMilli)
		for free, n := range left {
			if n > 0 && free >= p.Milli && free < best {
				best = free
			}
		}
		if best < cluster.WholeMilli {
			left[best]--
		}
		left[best-p.Milli]++
	}
	for free, n := range left {
		idle += free * n
	}
	of := func(milli int64) float64 { return float64(milli) * 100 / float64(capacity) }
	return Ceiling{of(room), of(capacity - min(idle, capacity))}
}

// replayPercent is how far the published procedure goes.
const replayPercent = 130

// Policies are the ways to place that Replay knows, the scheduler's own first: fgd keeps
// fragmentation low (place.Mix), binpack is how it places while it expects no work with GPUs. The others are
// peers, as they were published: paperfgd is the rule that fgd comes from. With consolidate, which is fgd besides, Burstable and
// BE pods move elsewhere when that makes room for one that finds none; it takes 30 times as long.
var Policies = []string{"fgd", "binpack", "paperfgd", "bestfit", "dotprod", "random", "consolidate"}

// Replay asks for each pod once in the order of a seed, and nothing ever leaves
// (Weng et al., Beware of Fragmentation, USENIX ATC 2023).
func (t *Trace) Replay(policy string, seed uint64) (*Replay, error) {
	var p placer
	switch policy {
	case "consolidate":
		p = newMover(t)
	case "fgd":
		p = newEngine(t, true)
	case "binpack":
		p = newEngine(t, false)
	case "paperfgd", "random", "bestfit", "dotprod":
		p = newPaper(t, policy, seed)
	default:
		return nil, fmt.Errorf("unknown policy %q; known: %s", policy, strings.Join(Policies, ", "))
	}
	r := &Replay{}
	asked, given, capacity := int64(0), int64(0), t.Capacity()
	note := func() {
		for int64(len(r.Allocated))*capacity <= asked*100 {
			r.Allocated = append(r.Allocated, float64(given)*100/float64(capacity))
		}
	}
	for _, pod := range t.Arrivals(seed, replayPercent) {
		note()
		asked += pod.Demand()
		if p.place(pod) {
			given += pod.Demand()
			r.Placed++
		} else {
			r.Failed++
		}
	}
	note()
	if m, moves := p.(*mover); moves {
		r.Moves = m.moves
		return r, m.err
	}
	return r, nil
}

// placer places one pod for good, or says that it cannot.
type placer interface{ place(*TracePod) bool }

// engine is the scheduler's placement, on nodes and jobs as it knows them.
type engine struct {
	view   *place.View
	trace  *Trace
	nodes  []*cluster.Node
	config cluster.SchedulerConfiguration
	jobs   map[*TracePod]*cluster.Job
	n      int
}

// records are the nodes as their agents would register them.
func (t *Trace) records() (nodes []*cluster.Node) {
	for i, n := range t.Nodes {
		r := &cluster.NodeResources{Cpu: cluster.NodeCPU{CpuShares: n.CPU}, Memory: cluster.NodeMemory{MemoryMB: n.Memory}}
		if n.GPUs > 0 {
			g := &cluster.NodeDeviceResource{Vendor: "nvidia", Type: "gpu", Name: n.Model}
			for k := range n.GPUs {
				g.Instances = append(g.Instances, &cluster.NodeDevice{ID: fmt.Sprintf("%s-%d", n.Name, k), Healthy: true})
			}
			r.Devices = append(r.Devices, g)
		}
		nodes = append(nodes, &cluster.Node{
			ID: fmt.Sprintf("%06d", i), Name: n.Name, Datacenter: "dc1", NodePool: cluster.DefaultNodePool, NodeResources: r,
			Drivers: map[string]*cluster.DriverInfo{"exec": {Detected: true, Healthy: true}},
			Status:  cluster.NodeStatusReady, SchedulingEligibility: cluster.NodeEligible,
		})
	}
	return nodes
}

// asks is what a pod asks for.
func (p *TracePod) asks() *cluster.Resources {
	r := &cluster.Resources{CPU: int(p.CPU), MemoryMB: int(p.Memory)}
	if p.GPUs > 0 {
		d := &cluster.RequestedDevice{Name: "nvidia/gpu", Count: uint64(p.GPUs)}
		if p.Milli < cluster.WholeMilli {
			d.Name, d.Count = "nvidia/gpu-milli", uint64(p.Milli)
		}
		if len(p.Models) > 0 {
			d.Constraints = []*cluster.Constraint{{LTarget: "${device.model}", Operand: "regexp", RTarget: "^(" + strings.Join(p.Models, "|") + ")$"}}
		}
		r.Devices = []*cluster.RequestedDevice{d}
	}
	return r
}

func newEngine(t *Trace, expect bool) *engine {
	e := &engine{trace: t, nodes: t.records(), jobs: map[*TracePod]*cluster.Job{}}
	var cache place.Cache
	if expect {
		cache.Expect(e.mix())
	}
	e.view = cache.View(e)
	return e
}

// mix is the work of the trace.
func (e *engine) mix() *place.Mix {
	var work []place.Work
	for i := range e.trace.Pods {
		j := e.job(&e.trace.Pods[i])
		work = append(work, place.Work{Job: j, Group: j.TaskGroups[0], Allocs: 1})
	}
	return place.NewMix(work)
}

func (e *engine) job(p *TracePod) *cluster.Job {
	if j := e.jobs[p]; j != nil {
		return j
	}
	j := &cluster.Job{
		Namespace: cluster.DefaultNamespace, ID: p.Name, Type: cluster.JobTypeBatch, Datacenters: []string{"*"}, NodePool: cluster.DefaultNodePool,
		TaskGroups: []*cluster.TaskGroup{{Name: "g", Count: 1, Tasks: []*cluster.Task{{Name: "t", Driver: "exec", Resources: p.asks()}}}},
	}
	e.jobs[p] = j
	return j
}

func (e *engine) place(p *TracePod) bool {
	j := e.job(p)
	newID := func() string { e.n++; return strconv.Itoa(e.n) }
	eval := &cluster.Evaluation{ID: newID(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, TriggeredBy: cluster.TriggerJobRegister, Status: cluster.EvalStatusPending}
	return len(e.view.Plan(place.Input{Job: j, Eval: eval, Now: 1, NewID: newID}).Plan.Place) == 1
}

// The state in which nothing runs yet; what is placed the view remembers.

func (e *engine) Index(cluster.WatchSet, ...string) uint64 { return 1 }

func (e *engine) Nodes(cluster.WatchSet, string) []*cluster.Node { return e.nodes }

func (e *engine) AllocsHolding(cluster.WatchSet, string) []*cluster.Allocation { return nil }

func (e *engine) AllocsByJob(cluster.WatchSet, cluster.JobKey) []*cluster.Allocation { return nil }

func (e *engine) JobVersion(cluster.WatchSet, cluster.JobKey, uint64) *cluster.Job { return nil }

func (e *engine) LatestDeployment(cluster.WatchSet, cluster.JobKey) *cluster.Deployment { return nil }

func (e *engine) Eval(cluster.WatchSet, string) *cluster.Evaluation { return nil }

func (e *engine) OpenEvalsByJob(cluster.JobKey) []*cluster.Evaluation { return nil }

func (e *engine) RunLimited() bool { return false }

func (e *engine) EvalsShortOfRoom(func(*cluster.Evaluation) bool) {}

func (e *engine) Job(cluster.WatchSet, cluster.JobKey) *cluster.Job { return nil }

func (e *engine) Claims() []*cluster.Evaluation { return nil }

func (e *engine) SchedulerConfig(cluster.WatchSet) *cluster.SchedulerConfiguration { return &e.config }

func (e *engine) Usage(_ cluster.WatchSet, namespace string) *cluster.Usage {
	return &cluster.Usage{Namespace: namespace}
}

func (e *engine) Allowance(string, func(string) *cluster.Usage) *cluster.Allowance { return nil }

func (e *engine) Borrowed(string) []cluster.Borrowed                 { return nil }
func (e *engine) ParallelChildren(*cluster.Job) (limit, running int) { return 0, 0 }

func (e *engine) FleetHold(cluster.WatchSet) *cluster.FleetHold    { return nil }
func (e *engine) NodesVersion() any                                { return e }
func (e *engine) AllocsVersion() any                               { return new(int) }
func (e *engine) HoldingVersions(func(nodeID string, version any)) {}
