package place

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/rxvision/rxvision/cluster"
)

var update = flag.Bool("update", false, "rewrite the plans in testdata/*.txtar with what placement gives now")

// epoch is "now" of every scenario; ages and delays are told from it.
const epoch = cluster.Time(1_800_000_000_000_000_000)

// TestScenarios reads testdata/*.txtar: each has the sections nodes, running
// (optional), was (the job's version 0, optional), job and plan. The language is
// that of the parse functions below; testdata/README.txt tells it.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := runScenario(t, ar)
			last := &ar.Files[len(ar.Files)-1]
			if last.Name != "plan" {
				t.Fatalf("%s: the last section must be plan, not %s", file, last.Name)
			}
			if *update {
				last.Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := string(last.Data); got != want {
				t.Errorf("%s\nplan:\n%s\nwant:\n%s\n(go test ./scheduler/place -update rewrites it)", file, got, want)
			}
		})
	}
}

// world is a Reader made of plain slices.
type world struct {
	nodes       []*cluster.Node
	allocs      []*cluster.Allocation
	versions    []*cluster.Job
	evals       []*cluster.Evaluation
	deployments []*cluster.Deployment
	config      cluster.SchedulerConfiguration
	hold        *cluster.FleetHold
	others      []*cluster.Evaluation // of other jobs
	short       []*cluster.Evaluation // that wait for room
	tenants     *cluster.State        // namespaces and their quotas; nil: there are none
}

func (w *world) Index(cluster.WatchSet, ...string) uint64                         { return 100 }
func (w *world) Nodes(cluster.WatchSet, string) []*cluster.Node                   { return w.nodes }
func (w *world) SchedulerConfig(cluster.WatchSet) *cluster.SchedulerConfiguration { return &w.config }

func (w *world) NodesVersion() any                             { return new(int) }
func (w *world) AllocsVersion() any                            { return new(int) }
func (w *world) FleetHold(cluster.WatchSet) *cluster.FleetHold { return w.hold }

func (w *world) AllocsHolding(_ cluster.WatchSet, id string) []*cluster.Allocation {
	out := w.allocsIf(func(a *cluster.Allocation) bool { return a.NodeID == id && a.Occupies() })
	slices.SortFunc(out, func(a, b *cluster.Allocation) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

func (w *world) AllocsByJob(_ cluster.WatchSet, k cluster.JobKey) []*cluster.Allocation {
	return w.allocsIf(func(a *cluster.Allocation) bool { return a.JobKey() == k })
}

func (w *world) allocsIf(keep func(*cluster.Allocation) bool) (out []*cluster.Allocation) {
	for _, a := range w.allocs {
		if keep(a) {
			out = append(out, a)
		}
	}
	return out
}

func (w *world) JobVersion(_ cluster.WatchSet, k cluster.JobKey, version uint64) *cluster.Job {
	for _, j := range w.versions {
		if j.Key() == k && j.Version == version {
			return j
		}
	}
	return nil
}

func (w *world) LatestDeployment(cluster.WatchSet, cluster.JobKey) *cluster.Deployment {
	if len(w.deployments) == 0 {
		return nil
	}
	return w.deployments[len(w.deployments)-1]
}

func (w *world) Eval(_ cluster.WatchSet, id string) *cluster.Evaluation {
	for _, e := range w.evals {
		if e.ID == id {
			return e
		}
	}
	return nil
}

func (w *world) OpenEvalsByJob(cluster.JobKey) []*cluster.Evaluation { return w.evals }

func (w *world) Claims() (out []*cluster.Evaluation) {
	for _, e := range slices.Concat(w.evals, w.others) {
		if len(e.Claims) > 0 {
			out = append(out, e)
		}
	}
	return out
}

func (w *world) Job(_ cluster.WatchSet, k cluster.JobKey) (newest *cluster.Job) {
	for _, j := range w.versions {
		if j.Key() == k && (newest == nil || j.Version > newest.Version) {
			newest = j
		}
	}
	return newest
}

func (w *world) RunLimited() bool { return slices.ContainsFunc(w.versions, (*cluster.Job).RunLimited) }

func (w *world) EvalsShortOfRoom(fn func(*cluster.Evaluation) bool) {
	for _, e := range w.short {
		if !fn(e) {
			return
		}
	}
}

func (w *world) HoldingVersions(fn func(string, any)) {
	for _, n := range w.nodes {
		fn(n.ID, new(int))
	}
}

func (w *world) Usage(_ cluster.WatchSet, namespace string) *cluster.Usage {
	u := &cluster.Usage{Namespace: namespace}
	for _, a := range w.allocsIf(func(a *cluster.Allocation) bool { return a.Namespace == namespace && a.Occupies() }) {
		j := w.JobVersion(nil, a.JobKey(), a.JobVersion)
		u.Add(cluster.NewUsage(namespace, a.AllocatedResources, j != nil && j.Preemptible()), 1)
	}
	return u
}

func (w *world) Allowance(namespace string, usage func(string) *cluster.Usage) *cluster.Allowance {
	if w.tenants == nil {
		return nil
	}
	if usage == nil {
		usage = func(namespace string) *cluster.Usage { return w.Usage(nil, namespace) }
	}
	return w.tenants.Snapshot().Allowance(namespace, usage)
}

func (w *world) Borrowed(namespace string) []cluster.Borrowed {
	return w.Allowance(namespace, nil).Borrowed()
}

// tenant reads a namespace with its quota.
func (w *world) tenant(t *testing.T, l *line) {
	if w.tenants == nil {
		w.tenants = cluster.NewState()
	}
	n := &cluster.Namespace{Name: l.words[0], Quota: l.words[0], Meta: map[string]string{}}
	for key, meta := range map[string]string{"cohort": cluster.MetaCohort, "lend": cluster.MetaLendPercent, "borrow": cluster.MetaBorrowPercent} {
		if v, has := l.keys[key]; has {
			n.Meta[meta] = v
		}
	}
	for _, cmd := range []cluster.Command{
		&cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: n.Name, Limits: []*cluster.QuotaLimit{{
			Region: "global", Devices: []*cluster.QuotaDevice{{Name: "nvidia/gpu", Count: l.num("gpus", 0)}},
		}}}}},
		&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{n}},
	} {
		cluster.StampOf(cmd).Time = int64(epoch)
		if res, err := w.tenants.Apply(w.tenants.Snapshot().Index(nil)+1, cluster.EncodeCommand(cmd)); err != nil || res.Err != nil {
			t.Fatalf("namespace %s: %v, %v", n.Name, err, res.Err)
		}
	}
}

// namespace is that of a job of the scenario.
func (w *world) namespace(job string) string {
	for _, j := range w.versions {
		if j.ID == job {
			return j.Namespace
		}
	}
	return cluster.DefaultNamespace
}

func (w *world) ParallelChildren(*cluster.Job) (limit, running int) { return 0, 0 }

// lineUp puts those that wait for room into their order.
func (w *world) lineUp() {
	for _, e := range w.short {
		e.Priority = w.Job(nil, e.JobKey()).Priority
	}
	slices.SortStableFunc(w.short, func(a, b *cluster.Evaluation) int { return b.Priority - a.Priority })
}

func runScenario(t *testing.T, ar *txtar.Archive) string {
	t.Helper()
	w := &world{}
	eval := &cluster.Evaluation{
		ID: "eval", Namespace: cluster.DefaultNamespace, Priority: 50, Type: cluster.JobTypeService,
		TriggeredBy: cluster.TriggerJobRegister, Status: cluster.EvalStatusPending, CreateIndex: 7, ModifyIndex: 7,
	}
	var job *cluster.Job
	var expect []Work
	for _, f := range ar.Files {
		for i, text := range strings.Split(string(f.Data), "\n") {
			l, err := parseLine(text)
			if err != nil {
				t.Fatalf("section %s, line %d: %v", f.Name, i+1, err)
			}
			if l == nil {
				continue
			}
			switch f.Name {
			case "nodes":
				w.nodes = append(w.nodes, l.node())
			case "was":
				w.version(l, 0)
			case "job":
				job = w.version(l, 1)
			case "others":
				w.version(l, 1)
			case "claims":
				w.claim(l, eval)
			case "waiting":
				w.short = append(w.short, w.waits(l))
			case "running":
				a := l.alloc(w.nodes)
				a.Namespace = w.namespace(a.JobID)
				w.allocs = append(w.allocs, a)
			case "deployment":
				w.deployments = append(w.deployments, l.deployment())
			case "eval":
				w.evals = append(w.evals, l.eval(eval))
			case "config":
				w.config.SchedulerAlgorithm = l.words[0]
				if l.has("preempt") {
					w.config.PreemptionConfig = cluster.PreemptionConfig{ServiceSchedulerEnabled: true, BatchSchedulerEnabled: true}
				}
			case "quotas":
				w.tenant(t, l)
			case "expect":
				expect = append(expect, l.work())
			case "hold":
				w.hold = &cluster.FleetHold{Reason: strings.Join(l.words, " ")}
			}
		}
	}
	if job != nil {
		eval.Namespace, eval.JobID, eval.Type, eval.Priority = job.Namespace, job.ID, job.Type, job.Priority
	} else {
		eval.JobID = w.allocs[0].JobID
	}
	for _, a := range w.allocs {
		w.fill(t, a)
	}
	slices.SortFunc(w.nodes, func(a, b *cluster.Node) int { return cmp.Compare(a.ID, b.ID) })
	w.lineUp()
	ids := 0
	in := Input{Job: job, Eval: eval, Now: epoch, NewID: func() string { ids++; return fmt.Sprintf("id%d", ids) }}
	var cache Cache
	if expect != nil {
		cache.Expect(NewMix(expect))
	}
	var b strings.Builder
	for _, e := range w.short {
		f := cache.View(w).Forecast(Input{Job: w.Job(nil, e.JobKey()), Eval: e, Now: epoch})
		fmt.Fprintf(&b, "forecast %s: %s\n", e.JobID, foretold(f))
	}
	return b.String() + describe(cache.View(w).Plan(in))
}

// waits reads `JOB`: another job that found no room, in the order in which they wait.
func (w *world) waits(l *line) *cluster.Evaluation {
	return &cluster.Evaluation{
		ID: "of-" + l.words[0], Namespace: cluster.DefaultNamespace, JobID: l.words[0], Status: cluster.EvalStatusBlocked,
		CreateIndex: uint64(len(w.short) + 1), FailedTGAllocs: map[string]*cluster.AllocMetric{"g": {}},
	}
}

func foretold(f Forecast) string {
	if !f.Known {
		return f.Why
	}
	text := "in " + time.Duration(f.Start-epoch).String()
	for _, s := range f.Places {
		text += fmt.Sprintf(", %s on %s", s.Name, s.NodeID)
		for _, name := range slices.Sorted(maps.Keys(s.Resources.Tasks)) {
			for _, d := range s.Resources.Tasks[name].Devices {
				text += " " + strings.Join(d.DeviceIDs, ",")
			}
		}
	}
	return text + prefixed(" after ", strings.Join(f.Awaits, ","))
}

// work reads `N DEVICE [count cpu memory]`: so many allocations of one task.
func (l *line) work() Work {
	n, err := strconv.ParseInt(l.words[0], 10, 64)
	if err != nil {
		panic(err)
	}
	r := &cluster.Resources{CPU: int(l.num("cpu", 100)), MemoryMB: int(l.num("memory", 300))}
	r.Devices = []*cluster.RequestedDevice{{Name: l.words[1], Count: uint64(l.num("count", 1))}}
	g := &cluster.TaskGroup{Name: "g", Count: int(n), Tasks: []*cluster.Task{{Name: "t", Driver: "raw_exec", Resources: r}}}
	return Work{Job: &cluster.Job{ID: "typical", Datacenters: []string{"*"}, NodePool: cluster.NodePoolAll, TaskGroups: []*cluster.TaskGroup{g}}, Group: g, Allocs: n}
}

// fill gives an allocation the resources that its job version asks for, unless
// the scenario told them.
func (w *world) fill(t *testing.T, a *cluster.Allocation) {
	if a.AllocatedResources != nil {
		return
	}
	j := w.JobVersion(nil, a.JobKey(), a.JobVersion)
	if j == nil {
		return
	}
	g := j.Group(a.TaskGroup)
	if g == nil {
		return
	}
	h := &host{node: &cluster.Node{NodeResources: &cluster.NodeResources{}}}
	for _, n := range w.nodes {
		if n.ID == a.NodeID {
			h.node = n
		}
	}
	h.use = cluster.NewNodeUse(h.node)
	for _, other := range w.allocs {
		if other != a && other.NodeID == a.NodeID && other.Occupies() {
			h.use.Add(other)
		}
	}
	r, err := newDemand(j, g).take(h, a.ID, nil)
	if err != nil && a.Occupies() {
		t.Fatalf("allocation %s of the scenario does not fit where it runs: %v", a.ID, err)
	}
	a.AllocatedResources = r
}

// line is WORD… KEY=VALUE…; a value with spaces is quoted.
type line struct {
	words []string
	keys  map[string]string
}

func parseLine(text string) (*line, error) {
	l := &line{keys: map[string]string{}}
	rest := strings.TrimSpace(text)
	if rest == "" || strings.HasPrefix(rest, "#") {
		return nil, nil
	}
	for rest != "" {
		end := strings.IndexAny(rest, " \"")
		if end < 0 {
			end = len(rest)
		}
		token := rest[:end]
		rest = rest[end:]
		if strings.HasPrefix(rest, `"`) {
			q, err := strconv.QuotedPrefix(rest)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rest, err)
			}
			s, _ := strconv.Unquote(q)
			token, rest = token+s, rest[len(q):]
		}
		rest = strings.TrimLeft(rest, " ")
		if k, v, ok := strings.Cut(token, "="); ok && k != "" && !strings.ContainsAny(k, "!<>$") {
			l.keys[k] = v
		} else {
			l.words = append(l.words, token)
		}
	}
	return l, nil
}

func (l *line) has(word string) bool { return slices.Contains(l.words, word) }

func (l *line) str(key, unset string) string {
	if v, ok := l.keys[key]; ok {
		return v
	}
	return unset
}

func (l *line) num(key string, unset int64) int64 {
	if v, ok := l.keys[key]; ok {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			panic(fmt.Sprintf("%s=%s: %v", key, v, err))
		}
		return n
	}
	return unset
}

func (l *line) dur(key string, unset time.Duration) time.Duration {
	if v, ok := l.keys[key]; ok {
		d, err := time.ParseDuration(v)
		if err != nil {
			panic(fmt.Sprintf("%s=%s: %v", key, v, err))
		}
		return d
	}
	return unset
}

func (l *line) node() *cluster.Node {
	n := &cluster.Node{
		ID: l.words[0], Name: l.words[0], Datacenter: l.str("dc", "dc1"), NodePool: l.str("pool", "default"),
		NodeClass: l.str("class", ""), Status: l.str("status", "ready"), SchedulingEligibility: cluster.NodeEligible,
		Attributes: map[string]string{}, Meta: map[string]string{}, Drivers: map[string]*cluster.DriverInfo{},
		NodeResources:     &cluster.NodeResources{},
		ReservedResources: &cluster.NodeReservedResources{},
	}
	if l.has("ineligible") || l.has("draining") {
		n.SchedulingEligibility = cluster.NodeIneligible
		n.Drain = l.has("draining")
	}
	n.NodeResources.Cpu.CpuShares = l.num("cpu", 4000)
	n.NodeResources.Memory.MemoryMB = l.num("memory", 8192)
	n.NodeResources.Disk.DiskMB = l.num("disk", 10000)
	n.NodeResources.Networks = []*cluster.NetworkResource{{Mode: "host", IP: "10.0.0.1", Device: "eth0"}}
	n.NodeResources.MinDynamicPort = int(l.num("ports_from", 20000))
	n.NodeResources.MaxDynamicPort = int(l.num("ports_to", 32000))
	n.ReservedResources.Networks.ReservedHostPorts = l.str("reserved_ports", "")
	n.ReservedResources.Memory.MemoryMB = l.num("reserved_memory", 0)
	for _, d := range strings.Split(l.str("drivers", "raw_exec,exec,onnx"), ",") {
		n.Drivers[d] = &cluster.DriverInfo{Detected: true, Healthy: !l.has(d + "-unhealthy")}
	}
	for k, v := range l.keys {
		if key, ok := strings.CutPrefix(k, "attr."); ok {
			n.Attributes[key] = v
		}
		if key, ok := strings.CutPrefix(k, "meta."); ok {
			n.Meta[key] = v
		}
	}
	sick, ids := strings.Split(l.str("sick", ""), ","), 0
	for _, nth := range []string{"", "2"} {
		model, ok := l.keys["gpu"+nth]
		if !ok {
			continue
		}
		g := &cluster.NodeDeviceResource{Vendor: "nvidia", Type: l.str("gpu_type"+nth, "gpu"), Name: model, Attributes: map[string]*cluster.Attribute{}}
		for range l.num("gpus"+nth, 1) {
			id := fmt.Sprintf("%s-gpu%d", n.ID, ids)
			d := &cluster.NodeDevice{ID: id, Healthy: !slices.Contains(sick, id)}
			if !d.Healthy {
				d.HealthDescription, d.UnhealthySince = l.str("because", "XID 79"), epoch.Add(-l.dur("since", 0))
			}
			g.Instances = append(g.Instances, d)
			ids++
		}
		memory := l.num("gpu_memory"+nth, 40960)
		g.Attributes["memory"] = &cluster.Attribute{Int: &memory, Unit: "MiB"}
		n.NodeResources.Devices = append(n.NodeResources.Devices, g)
	}
	if pairs, ok := l.keys["links"]; ok {
		l.link(n.NodeResources.Devices[0].Instances, pairs)
	}
	if id, ok := l.keys["cordoned"]; ok {
		d := n.Device(id)
		d.Healthy, d.UnhealthySince = false, epoch
		n.DeviceOrders = map[string]*cluster.DeviceOrder{id: {Order: cluster.DeviceCordon, Healthy: true}}
	}
	return n
}

// link reads `A-B:LEVEL,…,LEVEL`: links between devices by their numbers; the last is for all others.
func (l *line) link(devices []*cluster.NodeDevice, pairs string) {
	list := strings.Split(pairs, ",")
	rest, err := strconv.Atoi(list[len(list)-1])
	for _, d := range devices {
		for range devices {
			d.Links = append(d.Links, rest)
		}
	}
	for i, d := range devices {
		d.Links[i] = 0
	}
	for _, p := range list[:len(list)-1] {
		var a, b, level int
		if _, fault := fmt.Sscanf(p, "%d-%d:%d", &a, &b, &level); fault != nil {
			err = fault
		}
		devices[a].Links[b], devices[b].Links[a] = level, level
	}
	if err != nil {
		panic(fmt.Sprintf("links=%s: %v", pairs, err))
	}
}

// version reads the lines of a job: job, group, task, port, device, constraint,
// affinity, spread; the last five belong to what stands above them.
func (w *world) version(l *line, version uint64) *cluster.Job {
	var j *cluster.Job
	if l.words[0] != "job" {
		j = w.versions[len(w.versions)-1]
	}
	lastGroup := func() *cluster.TaskGroup { return j.TaskGroups[len(j.TaskGroups)-1] }
	lastTask := func() *cluster.Task { g := lastGroup(); return g.Tasks[len(g.Tasks)-1] }
	switch l.words[0] {
	case "job":
		j = &cluster.Job{
			Namespace: l.str("namespace", cluster.DefaultNamespace), ID: l.words[1], Name: l.words[1], Type: l.str("type", "service"),
			Priority: int(l.num("priority", 50)), Datacenters: strings.Split(l.str("dc", "*"), ","),
			NodePool: l.str("pool", "default"), AllAtOnce: l.has("all_at_once"), Stop: l.has("stopped"),
			Version: uint64(l.num("version", int64(version))), CreateIndex: 1, JobModifyIndex: 5,
		}
		w.versions = append(w.versions, j)
	case "group":
		g := &cluster.TaskGroup{Name: l.words[1], Count: int(l.num("count", 1)), EphemeralDisk: &cluster.EphemeralDisk{SizeMB: int(l.num("disk", 300))}}
		if n := l.num("max_parallel", 1); n > 0 && j.Type == cluster.JobTypeService {
			g.Update = &cluster.UpdateStrategy{
				MaxParallel: int(n), ProgressDeadline: 10 * time.Minute,
				Canary: int(l.num("canary", 0)), AutoRevert: l.has("auto_revert"), AutoPromote: l.has("auto_promote"),
			}
		}
		if j.PerNode() && l.num("max_parallel", 0) > 0 {
			g.Update = &cluster.UpdateStrategy{MaxParallel: int(l.num("max_parallel", 0)), Stagger: l.dur("stagger", 30*time.Second)}
		}
		g.ReschedulePolicy = &cluster.ReschedulePolicy{
			Attempts: int(l.num("attempts", 0)), Interval: l.dur("interval", time.Hour), Delay: l.dur("delay", 30*time.Second),
			DelayFunction: l.str("delay_function", "exponential"), MaxDelay: l.dur("max_delay", time.Hour),
			Unlimited: !l.has("limited"),
		}
		if l.has("disconnect") {
			g.Disconnect = &cluster.DisconnectStrategy{
				LostAfter: l.dur("lost_after", 0), Replace: !l.has("no_replace"), Reconcile: l.str("reconcile", cluster.ReconcileBestScore),
			}
		}
		if l.has("gang") {
			g.Gang = &cluster.Gang{Required: l.has("required")}
			if t := l.str("topology", ""); t != "" {
				g.Gang.Topology = strings.Split(t, ",")
			}
		}
		if p := (cluster.PreemptPolicy{Never: l.has("never"), Reclaim: l.has("reclaim"), Move: l.has("move"), MinRuntime: l.dur("min_runtime", 0)}); p != (cluster.PreemptPolicy{}) {
			g.Preempt = &p
		}
		g.MaxRunDuration = l.dur("limit", 0)
		if spot, ok := l.keys["spot"]; ok {
			g.Meta = map[string]string{cluster.MetaSpot: spot}
		}
		j.TaskGroups = append(j.TaskGroups, g)
	case "task":
		t := &cluster.Task{
			Name: l.words[1], Driver: l.str("driver", "raw_exec"), Config: []byte(`{"command":"` + l.str("command", "true") + `"}`),
			Resources: &cluster.Resources{CPU: int(l.num("cpu", 100)), MemoryMB: int(l.num("memory", 256))},
		}
		if hook := l.str("hook", ""); hook != "" {
			t.Lifecycle = &cluster.TaskLifecycle{Hook: hook, Sidecar: l.has("sidecar")}
		}
		t.KillTimeout = l.dur("kill_timeout", 5*time.Second)
		lastGroup().Tasks = append(lastGroup().Tasks, t)
	case "port":
		g := lastGroup()
		if g.Networks == nil {
			g.Networks = []*cluster.NetworkResource{{Mode: "host"}}
		}
		p := cluster.Port{Label: l.words[1], Value: int(l.num("static", 0)), To: int(l.num("to", 0))}
		if p.Value > 0 {
			g.Networks[0].ReservedPorts = append(g.Networks[0].ReservedPorts, p)
		} else {
			g.Networks[0].DynamicPorts = append(g.Networks[0].DynamicPorts, p)
		}
	case "device":
		lastTask().Resources.Devices = append(lastTask().Resources.Devices, &cluster.RequestedDevice{Name: l.words[1], Count: uint64(l.num("count", 1))})
	case "constraint":
		c := &cluster.Constraint{Operand: l.words[1]}
		if len(l.words) > 2 {
			c.LTarget, c.Operand = l.words[1], l.words[2]
		}
		if len(l.words) > 3 {
			c.RTarget = l.words[3]
		}
		switch {
		case len(j.TaskGroups) == 0:
			j.Constraints = append(j.Constraints, c)
		case len(lastGroup().Tasks) == 0:
			lastGroup().Constraints = append(lastGroup().Constraints, c)
		case len(lastTask().Resources.Devices) > 0:
			d := lastTask().Resources.Devices
			d[len(d)-1].Constraints = append(d[len(d)-1].Constraints, c)
		default:
			lastTask().Constraints = append(lastTask().Constraints, c)
		}
	case "affinity":
		a := &cluster.Affinity{LTarget: l.words[1], Operand: l.words[2], Weight: int(l.num("weight", 50))}
		if len(l.words) > 3 {
			a.RTarget = l.words[3]
		}
		switch {
		case len(j.TaskGroups) == 0:
			j.Affinities = append(j.Affinities, a)
		case len(lastGroup().Tasks) == 0:
			lastGroup().Affinities = append(lastGroup().Affinities, a)
		case len(lastTask().Resources.Devices) > 0:
			d := lastTask().Resources.Devices
			d[len(d)-1].Affinities = append(d[len(d)-1].Affinities, a)
		default:
			lastTask().Affinities = append(lastTask().Affinities, a)
		}
	case "spread":
		s := &cluster.Spread{Attribute: l.words[1], Weight: int(l.num("weight", 50))}
		for _, value := range slices.Sorted(maps.Keys(l.keys)) {
			if value != "weight" {
				s.SpreadTarget = append(s.SpreadTarget, &cluster.SpreadTarget{Value: value, Percent: int(l.num(value, 0))})
			}
		}
		if len(j.TaskGroups) == 0 {
			j.Spreads = append(j.Spreads, s)
		} else {
			lastGroup().Spreads = append(lastGroup().Spreads, s)
		}
	default:
		panic("unknown word " + l.words[0])
	}
	return j
}

// alloc reads `ID NAME on NODE version=N STATUS…`.
func (l *line) alloc(nodes []*cluster.Node) *cluster.Allocation {
	name := l.words[1]
	job, rest, _ := strings.Cut(name, ".")
	group, _, _ := strings.Cut(rest, "[")
	a := &cluster.Allocation{
		ID: l.words[0], Namespace: cluster.DefaultNamespace, Name: name, JobID: job, TaskGroup: group,
		NodeID: l.words[3], JobVersion: uint64(l.num("version", 1)), JobCreateIndex: 1, CreateIndex: uint64(l.num("index", 10)),
		DesiredStatus: l.str("desired", "run"), DesiredDescription: l.str("why", ""), ClientStatus: l.str("client", "running"),
		DeploymentID: l.str("deployment", ""), FollowupEvalID: l.str("followup", ""), NextAllocation: l.str("next", ""),
		ModifyTime: int64(epoch.Add(-l.dur("ended", 0))),
	}
	yes, no := true, false
	if l.has("healthy") {
		a.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: &yes}
	}
	if l.has("unhealthy") {
		a.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: &no}
	}
	if l.has("canary") {
		if a.DeploymentStatus == nil {
			a.DeploymentStatus = &cluster.AllocDeploymentStatus{}
		}
		a.DeploymentStatus.Canary = true
	}
	if _, ok := l.keys["unknown"]; ok {
		a.ClientStatus, a.UnknownSince = cluster.AllocClientUnknown, epoch.Add(-l.dur("unknown", 0))
	}
	if _, ok := l.keys["up"]; ok {
		a.TaskStates = map[string]*cluster.TaskState{"t": {State: cluster.TaskStateRunning, StartedAt: epoch.Add(-l.dur("up", 0))}}
	}
	if l.has("overrun") {
		a.TaskStates = map[string]*cluster.TaskState{"t": {State: cluster.TaskStateDead, Failed: true, FinishedAt: epoch, Events: []*cluster.TaskEvent{{Type: cluster.EventRunLimit}}}}
	}
	if _, ok := l.keys["score"]; ok {
		a.Metrics = &cluster.AllocMetric{ScoreMetaData: []*cluster.NodeScore{{NodeID: a.NodeID, Norm: l.num("score", 0)}}}
	}
	if _, ok := l.keys["checkpoint"]; ok {
		a.Checkpoints = map[string]*cluster.Checkpoint{"t": {Step: 7, Time: epoch.Add(-l.dur("checkpoint", 0)), Path: "/c"}}
	}
	if l.has("migrate") {
		a.DesiredTransition.Migrate = &yes
	}
	if l.has("forced") {
		a.DesiredTransition.ForceReschedule = &yes
	}
	if n := l.num("rescheduled", 0); n > 0 {
		a.RescheduleTracker = &cluster.RescheduleTracker{}
		for i := range n {
			a.RescheduleTracker.Events = append(a.RescheduleTracker.Events, &cluster.RescheduleEvent{
				RescheduleTime: int64(epoch.Add(-l.dur("ended", 0) - time.Duration(n-i)*time.Minute)),
				Delay:          l.dur("delay", 30*time.Second), PrevNodeID: l.str("from", "n9"),
			})
		}
	}
	if cpu, ok := l.keys["cpu"]; ok { // another job's: told in numbers
		n, _ := strconv.ParseInt(cpu, 10, 64)
		r := &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{"t": {
			Cpu: cluster.AllocatedCPU{CpuShares: n}, Memory: cluster.AllocatedMemory{MemoryMB: l.num("memory", 0)},
		}}}
		if p := l.num("port", 0); p > 0 {
			r.Shared.Ports = []cluster.PortMapping{{Label: "x", Value: int(p)}}
		}
		if ids, ok := l.keys["gpus"]; ok {
			r.Tasks["t"].Devices = []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", DeviceIDs: strings.Split(ids, ","), Milli: l.num("milli", 0), MiB: l.num("mib", 0)}}
		}
		a.AllocatedResources = r
	}
	return a
}

// claim reads `JOB NAME on NODE gpus=ID,… awaits=ALLOC,… [preempts=ALLOC,…] [priority=N]`.
func (w *world) claim(l *line, answered *cluster.Evaluation) {
	e := answered
	if job := l.words[0]; job != "own" {
		i := slices.IndexFunc(w.others, func(e *cluster.Evaluation) bool { return e.JobID == job })
		if i < 0 {
			i = len(w.others)
			w.others = append(w.others, &cluster.Evaluation{ID: "of-" + job, Namespace: cluster.DefaultNamespace, JobID: job, Status: cluster.EvalStatusBlocked})
		}
		e = w.others[i]
	}
	e.Priority = int(l.num("priority", 50))
	split := func(key string) []string {
		return strings.FieldsFunc(l.str(key, ""), func(r rune) bool { return r == ',' })
	}
	r := &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{"t": {
		Cpu: cluster.AllocatedCPU{CpuShares: l.num("cpu", 100)}, Memory: cluster.AllocatedMemory{MemoryMB: l.num("memory", 256)},
		Devices: []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", DeviceIDs: split("gpus")}},
	}}}
	e.Claims = append(e.Claims, &cluster.Claim{
		AllocID: "claimed-" + l.words[1], Name: l.words[1], JobVersion: 1, NodeID: l.words[3], Resources: r, Awaits: split("awaits"), Preempts: split("preempts"),
	})
}

func (l *line) deployment() *cluster.Deployment {
	return &cluster.Deployment{
		ID: l.words[0], Namespace: cluster.DefaultNamespace, JobVersion: uint64(l.num("version", 1)), JobCreateIndex: 1,
		Status: l.str("status", "running"), TaskGroups: map[string]*cluster.DeploymentState{l.str("group", "web"): {
			DesiredTotal: int(l.num("total", 1)), DesiredCanaries: int(l.num("canaries", 0)), Promoted: l.has("promoted"),
		}},
	}
}

// eval reads `ID STATUS`; the ID "eval" means the evaluation that is answered.
func (l *line) eval(answered *cluster.Evaluation) *cluster.Evaluation {
	e := answered
	if l.words[0] != "eval" {
		e = &cluster.Evaluation{ID: l.words[0], Namespace: cluster.DefaultNamespace}
	}
	e.Status = l.words[1]
	return e
}

// describe prints a plan the way scenarios tell it.
func describe(r *Result) string {
	var b bytes.Buffer
	p := r.Plan
	if d := p.Deployment; d != nil {
		for _, name := range slices.Sorted(maps.Keys(d.TaskGroups)) {
			g := d.TaskGroups[name]
			fmt.Fprintf(&b, "deployment %s %s: %d", d.ID, name, g.DesiredTotal)
			if g.DesiredCanaries > 0 {
				fmt.Fprintf(&b, " canaries=%d: %s", g.DesiredCanaries, d.StatusDescription)
			}
			b.WriteString("\n")
		}
	}
	for _, u := range p.DeploymentUpdates {
		fmt.Fprintf(&b, "deployment %s %s: %s\n", u.DeploymentID, u.Status, u.StatusDescription)
	}
	for _, s := range p.Stop {
		if s.DesiredStatus == "" {
			fmt.Fprintf(&b, "%s %s%s\n", cmp.Or(s.ClientStatus, "later"), s.AllocID, prefixed(" by ", s.FollowupEvalID))
			continue
		}
		verb := "stop"
		if s.PreemptedBy != "" {
			verb = "preempt"
		}
		fmt.Fprintf(&b, "%s %s%s: %s%s\n", verb, s.AllocID, prefixed(" ", s.ClientStatus), s.DesiredDescription, prefixed(", keeps ", s.Keeps))
	}
	for _, a := range p.Place {
		verb := "place"
		if a.CreateIndex > 0 {
			verb = "update"
		}
		fmt.Fprintf(&b, "%s %s %s on %s", verb, a.ID, a.Name, a.NodeID)
		if a.JobVersion != p.JobVersion {
			fmt.Fprintf(&b, " version=%d", a.JobVersion)
		}
		if a.Canary() {
			b.WriteString(" canary")
		}
		for _, m := range a.AllocatedResources.Shared.Ports {
			fmt.Fprintf(&b, " %s=%d", m.Label, m.Value)
			if m.To != 0 {
				fmt.Fprintf(&b, "→%d", m.To)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(a.AllocatedResources.Tasks)) {
			for _, d := range a.AllocatedResources.Tasks[name].Devices {
				fmt.Fprintf(&b, " %s:%s", name, strings.Join(d.DeviceIDs, ","))
				if d.Shared() {
					fmt.Fprintf(&b, "(%d‰ %d MiB)", d.Milli, d.MiB)
				}
			}
		}
		if verb == "place" {
			best := a.Metrics.ScoreMetaData[0]
			fmt.Fprintf(&b, " score=%d", best.Norm)
			for _, name := range []string{scoreAffinity, scoreDevices, scoreSpreads, scoreLinks} {
				if s, applies := best.Scores[name]; applies {
					fmt.Fprintf(&b, " %s=%d", name, s)
				}
			}
		}
		b.WriteString(prefixed(" preempted ", strings.Join(a.PreemptedAllocations, ",")))
		if c := a.Checkpoints["t"]; c != nil {
			fmt.Fprintf(&b, " from step %d", c.Step)
		}
		b.WriteString(prefixed(" deployment=", a.DeploymentID) + prefixed(" after ", a.PreviousAllocation))
		if t := a.RescheduleTracker; t != nil {
			fmt.Fprintf(&b, " rescheduled=%d delay=%s", len(t.Events), t.Events[len(t.Events)-1].Delay)
		}
		b.WriteString("\n")
	}
	for _, name := range slices.Sorted(maps.Keys(r.Failed)) {
		m := r.Failed[name]
		fmt.Fprintf(&b, "failed %s: evaluated=%d filtered=%d exhausted=%d in-pool=%d available=%v", name, m.NodesEvaluated, m.NodesFiltered, m.NodesExhausted, m.NodesInPool, m.NodesAvailable)
		if m.CoalescedFailures > 0 {
			fmt.Fprintf(&b, " and %d more", m.CoalescedFailures)
		}
		b.WriteString("\n")
		for _, q := range m.QuotaExhausted {
			fmt.Fprintf(&b, "  quota %s\n", q)
		}
		for _, list := range []struct {
			what   string
			counts map[string]int
		}{{"constraint", m.ConstraintFiltered}, {"class", m.ClassFiltered}, {"dimension", m.DimensionExhausted}, {"class exhausted", m.ClassExhausted}} {
			for _, k := range slices.Sorted(maps.Keys(list.counts)) {
				fmt.Fprintf(&b, "  %s %q: %d\n", list.what, k, list.counts[k])
			}
		}
	}
	for _, e := range p.Evals {
		fmt.Fprintf(&b, "eval %s %s%s%s%s%s%s", e.ID, e.Status, trigger(e), prefixed(" deployment=", e.DeploymentID), prefixed(" blocked=", e.BlockedEval), prefixed(" after ", e.PreviousEval), prefixed(": ", e.StatusDescription))
		if e.WaitUntil != 0 {
			fmt.Fprintf(&b, " in %s", time.Duration(e.WaitUntil-epoch))
		}
		b.WriteString("\n")
		for _, c := range e.Claims {
			fmt.Fprintf(&b, "  claims %s for %s %s", c.NodeID, c.AllocID, c.Name)
			for _, name := range slices.Sorted(maps.Keys(c.Resources.Tasks)) {
				for _, d := range c.Resources.Tasks[name].Devices {
					fmt.Fprintf(&b, " %s:%s", name, strings.Join(d.DeviceIDs, ","))
				}
			}
			b.WriteString(prefixed(" after ", strings.Join(c.Awaits, ",")) + "\n")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Annotations.DesiredTGUpdates)) {
		u := r.Annotations.DesiredTGUpdates[name]
		fmt.Fprintf(&b, "%s:", name)
		for _, c := range []struct {
			what string
			n    uint64
		}{{"ignore", u.Ignore}, {"place", u.Place}, {"migrate", u.Migrate}, {"stop", u.Stop}, {"in-place", u.InPlaceUpdate}, {"destructive", u.DestructiveUpdate}, {"canary", u.Canary}, {"preempt", u.Preemptions}} {
			if c.n > 0 {
				fmt.Fprintf(&b, " %s=%d", c.what, c.n)
			}
		}
		if q := r.Queued[name]; q > 0 {
			fmt.Fprintf(&b, " queued=%d", q)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// trigger tells those of an evaluation that say more than its description.
func trigger(e *cluster.Evaluation) string {
	if e.TriggeredBy == cluster.TriggerMaxDisconnect {
		return " " + e.TriggeredBy
	}
	return ""
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}
