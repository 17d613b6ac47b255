package place

import (
	"cmp"
	"maps"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// need is what a demand asks of one dimension.
type need struct {
	what, unit string
	asked      int64
	ask        *deviceAsk // nil: not of devices
}

// Units of a Shortage.
const (
	unitMHz     = "MHz"
	unitMiB     = "MiB"
	unitDevices = "devices"
	unitMilli   = "milli"
)

// deviceNeeds adds up what is asked of each kind of device; shares stand for themselves.
func (d *demand) deviceNeeds() (out []*need) {
	for i := range d.devices {
		a := &d.devices[i]
		n := &need{what: a.name, unit: unitDevices, asked: int64(a.count), ask: a}
		switch {
		case a.mib > 0:
			n.unit, n.asked = unitMiB, a.mib
		case a.milli > 0:
			n.unit, n.asked = unitMilli, a.milli
		default:
			if same := slices.IndexFunc(out, func(o *need) bool { return o.what == n.what && o.unit == unitDevices }); same >= 0 {
				out[same].asked += n.asked
				continue
			}
		}
		out = append(out, n)
	}
	return out
}

// lack is a need that a host cannot meet.
type lack struct {
	need
	most, free, total int64
}

// lacks finds all that the host has too little left of, not only the first.
func (d *demand) lacks(h *host, devices []*need) (out []lack) {
	cpu, memory, disk := h.node.Available()
	for _, x := range [...]struct {
		what, unit         string
		asked, used, total int64
	}{
		{"cpu", unitMHz, d.cpu, h.use.CPU, cpu}, {"memory", unitMiB, d.memory, h.use.Memory, memory}, {"disk", unitMiB, d.disk, h.use.Disk, disk},
	} {
		if free := max(0, x.total-x.used); x.used+x.asked > x.total {
			out = append(out, lack{need{what: x.what, unit: x.unit, asked: x.asked}, free, free, x.total})
		}
	}
	if len(d.networks) > 0 {
		if _, fault := h.takePorts(d.networks, ""); fault != "" {
			out = append(out, lack{need: need{what: fault}})
		}
	}
	short := false
	for _, n := range devices {
		if l := n.of(h, d.patterns); l.most < l.asked || n.ask.shared() && !l.fits(h, d.patterns) {
			short = true
			out = append(out, l)
		}
	}
	if d.judge.mix = nil; !short && len(devices) > 0 && takeDevices(h.node, slices.Clone(h.room()), d.devices, d.patterns, &d.judge, nil) != "" {
		out = append(out, lack{need: need{what: "devices: not all at once"}})
	}
	return out
}

// of says how much of a need for devices a host has.
func (n *need) of(h *host, patterns patternCache) lack {
	l := lack{need: *n}
	room := h.room()
	for i := range room {
		r := &room[i]
		if g := h.node.NodeResources.Devices[r.group]; !n.ask.means(g, patterns) || !n.ask.wantsID(g, r.id) {
			continue
		}
		switch n.unit {
		case unitDevices:
			l.total++
			if r.whole {
				l.free++
			}
			l.most = l.free
		case unitMiB:
			l.total, l.free, l.most = l.total+r.memory, l.free+r.mib, max(l.most, r.mib)
		default:
			l.total, l.free, l.most = l.total+cluster.WholeMilli, l.free+r.milli, max(l.most, r.milli)
		}
	}
	return l
}

// fits says whether one of the host's devices has room for a share.
func (l *lack) fits(h *host, patterns patternCache) bool {
	room := h.room()
	return slices.ContainsFunc(room, func(r deviceRoom) bool {
		g := h.node.NodeResources.Devices[r.group]
		return l.ask.means(g, patterns) && l.ask.wantsID(g, r.id) && l.ask.fits(&r)
	})
}

// findHolders looks at each node that could run the group but is full: what it has too little left of, and who holds
// that.
func (p *planner) findHolders(s *cluster.GroupStanding, nodes *search) {
	owed := slices.ContainsFunc(p.missed, func(m missing) bool { return m.group.name == s.Name && p.owed(m.group, len(m.wants)) })
	d := nodes.demand
	devices := d.deviceNeeds()
	short := map[string]*cluster.Shortage{}
	holders := map[holderKey]*holding{}
	for i := range nodes.list {
		k := &nodes.list[i]
		h := k.host
		if k.exhausted == "" || nodes.refusal(h.index, p.onJob.on(h.index), p.onGroup[s.Name].on(h.index)) != admitted {
			continue
		}
		lacks := d.lacks(h, devices)
		for _, l := range lacks {
			x := short[l.what]
			if x == nil {
				x = &cluster.Shortage{What: l.what, Unit: l.unit, Asked: l.asked}
				short[l.what] = x
			}
			x.Nodes++
			x.Most, x.Free, x.Total = max(x.Most, l.most), x.Free+l.free, x.Total+l.total
			x.Examples = example(x.Examples, h)
		}
		p.holdersOn(h, d, lacks, holders, owed)
	}
	s.Shortages = slices.SortedFunc(maps.Values(short), func(a, b *cluster.Shortage) int {
		return cmp.Or(cmp.Compare(b.Nodes, a.Nodes), cmp.Compare(a.What, b.What))
	})
	s.Shortages, _ = few(s.Shortages)
	list := slices.SortedFunc(maps.Values(holders), func(a, b *holding) int {
		return cmp.Or(cmp.Compare(b.Milli, a.Milli), cmp.Compare(b.Allocs, a.Allocs), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.JobID, b.JobID))
	})
	for i, x := range list {
		x.Obstacles = obstacles(x.shields)
		if i < cluster.MaxExplained {
			s.Holders = append(s.Holders, &x.Holder)
			continue
		}
		if s.Others == nil {
			s.Others = &cluster.Holder{}
		}
		s.Others.Join(&x.Holder)
	}
}

type holderKey struct {
	job             cluster.JobKey
	claim, reserved bool
}

// holding is a Holder that is being added up.
type holding struct {
	cluster.Holder
	shields map[string]*cluster.Obstacle
	last    *host // the node that was counted last
	forever bool  // one of them does not say when it ends
}

// holdersOn adds up who holds on a host what it has too little left of.
func (p *planner) holdersOn(h *host, d *demand, lacks []lack, holders map[holderKey]*holding, owed bool) {
	own := p.in.Eval.JobKey()
	add := func(key holderKey, a *cluster.Allocation, n int) *holding {
		part, holds := d.part(h, a, lacks)
		if !holds {
			return nil
		}
		x := holders[key]
		if x == nil {
			x = &holding{shields: map[string]*cluster.Obstacle{}}
			x.Namespace, x.JobID, x.Own, x.Claim, x.Reserved = key.job.Namespace, key.job.ID, key.job == own, key.claim, key.reserved
			holders[key] = x
		}
		x.Allocs += n
		x.Milli, x.CPU, x.MemoryMB, x.DiskMB, x.Ports = x.Milli+part.Milli, x.CPU+part.CPU, x.MemoryMB+part.MemoryMB, x.DiskMB+part.DiskMB, x.Ports+part.Ports
		if x.last != h {
			x.last, x.Nodes = h, x.Nodes+1
		}
		return x
	}
	run := func(a *cluster.Allocation) {
		x := add(holderKey{job: a.JobKey()}, a, 1)
		if x == nil {
			return
		}
		if began := beganAt(a); x.Since == 0 || began < x.Since {
			x.Since = began
		}
		if d, known := p.departure(a); !known {
			x.forever, x.Until = true, 0
		} else if !x.forever {
			x.Until = max(x.Until, d.at, p.in.Now)
			if d.at == 0 {
				x.Until = max(x.Until, p.in.Now+cluster.Time(d.takes))
			}
		}
		job := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion)
		if job == nil && x.Own {
			job = p.job
		}
		if job != nil {
			x.Priority = job.Priority
		}
		switch {
		case x.Own:
			obstruct(x.shields, cluster.ObstacleOwn, 0)
		case a.Terminal() || p.evictions[a.ID] || p.stopping[a.ID]:
			obstruct(x.shields, cluster.ObstacleEnding, 0)
		case job == nil || job.Group(a.TaskGroup) == nil:
		default:
			kind, until := p.shield(p.occupantOf(a), owed)
			if obstruct(x.shields, kind, until); kind == "" {
				x.Preemptible++
			}
		}
	}
	for _, a := range p.reader.AllocsHolding(nil, h.node.ID) {
		run(a)
	}
	for _, a := range h.planned {
		if a.JobID != "" {
			run(a)
		}
	}
	for _, st := range p.standings {
		if st.counted && st.host == h {
			if x := add(holderKey{job: st.job, claim: true}, st.rest, len(st.claims)); x != nil {
				x.Priority = st.priority
			}
		}
	}
	for _, st := range p.reserves.list {
		if st.counted && st.host == h {
			if x := add(holderKey{job: st.job, reserved: true}, st.rest, len(st.claims)); x != nil {
				x.Priority = st.priority
				if x.Since == 0 || st.from < x.Since {
					x.Since = st.from
				}
			}
		}
	}
}

// part is what an allocation on a host holds of what the host has too little left of.
func (d *demand) part(h *host, a *cluster.Allocation, lacks []lack) (x cluster.Holder, holds bool) {
	use := cluster.NewNodeUse(h.node)
	use.Add(a)
	counted := map[string]bool{} // devices: two asks may be about the same
	for _, l := range lacks {
		switch {
		case l.ask != nil:
			for id, held := range use.Devices {
				g := groupOf(h.node, id)
				if g == nil || counted[id] || !l.ask.means(g, d.patterns) {
					continue
				}
				counted[id] = true
				milli := held.Milli
				if held.Whole > 0 {
					milli = cluster.WholeMilli
				}
				x.Milli, holds = x.Milli+milli, true
			}
		case l.what == "cpu":
			x.CPU = use.CPU
		case l.what == "memory":
			x.MemoryMB = use.Memory
		case l.what == "disk":
			x.DiskMB = use.Disk
		default:
			for _, n := range d.networks {
				for _, port := range n.ReservedPorts {
					if use.Port(port.Value) {
						x.Ports++
					}
				}
			}
		}
	}
	return x, holds || x.CPU+x.MemoryMB+x.DiskMB > 0 || x.Ports > 0
}

func groupOf(n *cluster.Node, deviceID string) *cluster.NodeDeviceResource {
	for _, g := range n.NodeResources.Devices {
		if slices.ContainsFunc(g.Instances, func(d *cluster.NodeDevice) bool { return d.ID == deviceID }) {
			return g
		}
	}
	return nil
}
