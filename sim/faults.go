package sim

import (
	"slices"
	"time"
)

// faults injects one fault after the other until the calm.
type faults struct {
	w      *world
	next   int     // commands that must be committed before the next one
	last   int64   // when the last one began
	active []*heal // in the order of their begin
}

// heal ends a fault.
type heal struct{ do func() }

func newFaults(w *world) *faults { return &faults{w: w} }

// Between two faults. Where nothing is committed any more, time counts.
const (
	faultsLook = 100 * time.Millisecond
	faultsRest = 20 * time.Second
)

// begin injects until the calm.
func (f *faults) begin() {
	w := f.w
	w.after(faultsLook, func() {
		if w.calm {
			return
		}
		if w.truth.commands >= f.next || w.now-f.last > int64(faultsRest) {
			f.inject()
			f.next, f.last = w.truth.commands+w.rnd.IntN(2*w.weather.faultEvery), w.now
		}
		f.begin()
	})
}

// end lets a fault last for some time, or until the calm.
func (f *faults) end(after time.Duration, do func()) {
	h := &heal{do}
	f.active = append(f.active, h)
	f.w.after(after, func() {
		if i := slices.Index(f.active, h); i >= 0 {
			f.active = slices.Delete(f.active, i, i+1)
			h.do()
		}
	})
}

// stop heals everything.
func (f *faults) stop() {
	active := f.active
	f.active = nil
	for _, h := range active {
		h.do()
	}
}

// injection is a kind of fault; do is false when it cannot happen now.
type injection struct {
	name   string
	weight int
	do     func(f *faults) bool
}

func names(is []injection) (out []string) {
	for _, i := range is {
		out = append(out, i.name)
	}
	return out
}

var injections = []injection{
	{"server killed", 8, (*faults).killServer},
	{"leader killed", 6, (*faults).killLeader},
	{"all servers killed", 1, (*faults).killAll},
	{"server stopped for a while", 5, (*faults).pauseServer},
	{"server cut off", 5, (*faults).cutServer},
	{"one way cut", 5, (*faults).cutOneWay},
	{"servers split over a bridge", 3, (*faults).bridge},
	{"network flooded", 3, (*faults).flood},
	{"disk full", 4, (*faults).fillDisk},
	{"disk slow", 4, (*faults).slowDisk},
	{"server lags", 5, (*faults).lag},
	{"server's clock jumps", 5, (*faults).jumpClock},
	{"leadership moved", 4, (*faults).moveLeader},
	{"archive restored", 2, (*faults).restore},
	{"agent killed", 8, (*faults).killAgent},
	{"host died", 6, (*faults).killHost},
	{"host installed anew", 2, (*faults).wipeHost},
	{"node cut off", 6, (*faults).cutNode},
	{"many nodes cut off", 1, (*faults).cutNodes},
	{"node's clock jumps", 3, (*faults).jumpNodeClock},
	{"device sick", 6, (*faults).sicken},
	{"device gone", 2, (*faults).unplug},
}

// inject draws a fault that can happen.
func (f *faults) inject() {
	total := 0
	for _, i := range injections {
		total += i.weight
	}
	n := f.w.rnd.IntN(total)
	for _, i := range injections {
		if n -= i.weight; n >= 0 {
			continue
		}
		if i.do(f) {
			f.w.note("fault: %s", i.name)
			f.w.coverage.fault(i.name)
		}
		return
	}
}

// servers lists those that are up, and the leader among them.
func (f *faults) servers() (up []*server, leads *server) {
	for _, s := range f.w.servers {
		if s.up && !s.paused {
			up = append(up, s)
			if s.role == leader && (leads == nil || s.term > leads.term) {
				leads = s
			}
		}
	}
	return up, leads
}

// someServer draws one that is up, nil for none.
func (f *faults) someServer() *server {
	if up, _ := f.servers(); len(up) > 0 {
		return pick(f.w, up)
	}
	return nil
}

func (f *faults) kill(s *server, back time.Duration) {
	s.crash()
	f.end(back, func() {
		if !s.up {
			s.boot()
		}
	})
}

func (f *faults) killServer() bool {
	s := f.someServer()
	if s != nil {
		f.kill(s, f.w.between(100*time.Millisecond, 8*time.Second))
	}
	return s != nil
}

func (f *faults) killLeader() bool {
	_, s := f.servers()
	if s != nil {
		f.kill(s, f.w.between(100*time.Millisecond, 8*time.Second))
	}
	return s != nil
}

func (f *faults) killAll() bool {
	for _, s := range f.w.servers {
		if s.up {
			f.kill(s, f.w.between(time.Second, 10*time.Second))
		}
	}
	return true
}

func (f *faults) pauseServer() bool {
	s := f.someServer()
	if s == nil {
		return false
	}
	s.paused = true
	life := s.life
	f.end(f.w.between(100*time.Millisecond, 6*time.Second), func() {
		if s.life == life {
			s.paused = false
		}
	})
	return true
}

// cut blocks one direction between ends for some time.
func (f *faults) cut(d time.Duration, from, to address) {
	f.end(d, f.w.net.block(from, to))
}

func (f *faults) cutServer() bool {
	w := f.w
	s, d, nodes := pick(w, w.servers), w.between(200*time.Millisecond, 10*time.Second), w.chance(500)
	for _, p := range w.servers {
		if p != s {
			f.cut(d, s.addr, p.addr)
			f.cut(d, p.addr, s.addr)
		}
	}
	if nodes {
		for _, n := range w.nodes {
			f.cut(d, s.addr, n.addr)
			f.cut(d, n.addr, s.addr)
		}
		f.cut(d, outside, s.addr)
		f.cut(d, s.addr, outside)
	}
	return true
}

func (f *faults) cutOneWay() bool {
	w := f.w
	s, d := pick(w, w.servers), w.between(200*time.Millisecond, 10*time.Second)
	incoming, one := w.chance(500), w.chance(500)
	for _, p := range w.servers {
		if p == s {
			continue
		}
		if incoming {
			f.cut(d, p.addr, s.addr)
		} else {
			f.cut(d, s.addr, p.addr)
		}
		if one {
			break
		}
	}
	return true
}

// bridge leaves one server that hears both of two groups that do not hear each other.
func (f *faults) bridge() bool {
	w := f.w
	order, d := w.rnd.Perm(len(w.servers)), w.between(500*time.Millisecond, 8*time.Second)
	half := (len(order) - 1) / 2
	for _, a := range order[1 : 1+half] {
		for _, b := range order[1+half:] {
			f.cut(d, address(a), address(b))
			f.cut(d, address(b), address(a))
		}
	}
	return true
}

func (f *faults) flood() bool {
	w := f.w
	before := w.weather
	w.weather.lost, w.weather.doubled, w.weather.late = 300, 100, 300
	f.end(w.between(200*time.Millisecond, 3*time.Second), func() {
		w.weather.lost, w.weather.doubled, w.weather.late = before.lost, before.doubled, before.late
	})
	return true
}

func (f *faults) fillDisk() bool {
	s := pick(f.w, f.w.servers)
	if s.full {
		return false
	}
	s.full = true
	f.end(f.w.between(500*time.Millisecond, 10*time.Second), func() { s.full = false })
	return true
}

func (f *faults) slowDisk() bool {
	s := pick(f.w, f.w.servers)
	s.slow = f.w.upTo(500 * time.Millisecond)
	f.end(f.w.between(time.Second, 10*time.Second), func() { s.slow = 0 })
	return true
}

func (f *faults) lag() bool {
	s := pick(f.w, f.w.servers)
	s.lag = f.w.upTo(4 * time.Second)
	f.end(f.w.between(time.Second, 15*time.Second), func() { s.lag = 0 })
	return true
}

func (f *faults) jumpClock() bool {
	s := pick(f.w, f.w.servers)
	s.skew = f.w.between(-3*time.Minute, 3*time.Minute)
	f.end(f.w.between(time.Second, 20*time.Second), func() { s.skew = 0 })
	return true
}

func (f *faults) moveLeader() bool {
	up, old := f.servers()
	next := pick(f.w, f.w.servers)
	if old == nil || next == old || !slices.Contains(up, next) {
		return false
	}
	old.stepDown("leadership is moved")
	for _, s := range up {
		s.heard = 0 // nobody insists on the old leader
	}
	next.elect()
	return true
}

// restore puts an archive of some time ago in the place of the state.
func (f *faults) restore() bool {
	_, s := f.servers()
	archives := f.w.truth.archives
	if s == nil || s.reign == nil || s.full || len(archives) == 0 {
		return false
	}
	s.append(&entry{restore: pick(f.w, archives)})
	return true
}

func (f *faults) killAgent() bool {
	n := pick(f.w, f.w.nodes)
	if !n.agentUp {
		return false
	}
	n.crashAgent()
	f.end(f.w.between(50*time.Millisecond, 10*time.Second), n.startAgent)
	return true
}

func (f *faults) killHost() bool {
	n := pick(f.w, f.w.nodes)
	if !n.up {
		return false
	}
	n.die()
	f.end(f.w.between(500*time.Millisecond, 20*time.Second), func() { n.comeBack(false) })
	return true
}

func (f *faults) wipeHost() bool {
	n := pick(f.w, f.w.nodes)
	if !n.up {
		return false
	}
	n.die()
	f.end(f.w.between(time.Second, 20*time.Second), func() { n.comeBack(true) })
	return true
}

func (f *faults) isolate(n *node, d time.Duration) {
	for _, s := range f.w.servers {
		f.cut(d, n.addr, s.addr)
		f.cut(d, s.addr, n.addr)
	}
}

func (f *faults) cutNode() bool {
	w := f.w
	n, d := pick(w, w.nodes), w.between(500*time.Millisecond, 20*time.Second)
	if w.chance(300) { // from one server only
		s := pick(w, w.servers)
		f.cut(d, n.addr, s.addr)
		f.cut(d, s.addr, n.addr)
		return true
	}
	f.isolate(n, d)
	return true
}

func (f *faults) cutNodes() bool {
	d := f.w.between(6*time.Second, 25*time.Second)
	for _, n := range f.w.nodes {
		if f.w.chance(600) {
			f.isolate(n, d)
		}
	}
	return true
}

func (f *faults) jumpNodeClock() bool {
	n := pick(f.w, f.w.nodes)
	n.skew = f.w.between(-3*time.Minute, 3*time.Minute)
	f.end(f.w.between(time.Second, 20*time.Second), func() { n.skew = 0 })
	return true
}

func (f *faults) someGPU() (*node, *gpu) {
	n := pick(f.w, f.w.nodes)
	if len(n.gpus) == 0 {
		return nil, nil
	}
	return n, pick(f.w, n.gpus)
}

func (f *faults) sicken() bool {
	n, g := f.someGPU()
	if g == nil || !g.healthy {
		return false
	}
	g.healthy = false
	n.changed()
	f.end(f.w.between(time.Second, 30*time.Second), func() { g.healthy = true; n.changed() })
	return true
}

func (f *faults) unplug() bool {
	n, g := f.someGPU()
	if g == nil || g.absent {
		return false
	}
	g.absent = true
	n.changed()
	f.end(f.w.between(time.Second, 30*time.Second), func() { g.absent = false; n.changed() })
	return true
}
