package sim

import "time"

// weather is how bad the world is: drawn per seed, so that some runs are all
// about lost messages and others about full disks.
type weather struct {
	lost, doubled, late int           // thousandths of messages
	latency             time.Duration // of most messages, at most
	delay               time.Duration // of late ones, at most
	fsync               time.Duration // at most
	faultEvery          int           // commands between two faults, on average
	actEvery            time.Duration // between two actions of one user, on average
	failing             int           // thousandths of tasks that fail
	workers             int           // batches that a leader plans side by side
	snapshotEvery       int           // entries
}

func drawWeather(w *world) weather {
	return weather{
		lost: w.oneOf(0, 2, 10, 50), doubled: w.oneOf(0, 5, 30), late: w.oneOf(0, 10, 50),
		latency: w.between(200*time.Microsecond, 5*time.Millisecond), delay: w.between(50*time.Millisecond, 3*time.Second),
		fsync:      w.between(100*time.Microsecond, 10*time.Millisecond),
		faultEvery: w.oneOf(30, 60, 120, 300),
		actEvery:   w.between(30*time.Millisecond, 300*time.Millisecond),
		failing:    w.oneOf(0, 50, 200, 400), workers: 1 + w.rnd.IntN(4),
		snapshotEvery: 50 + w.rnd.IntN(600),
	}
}

// fair is the weather after the faults have stopped.
func fair(old weather) weather {
	return weather{latency: time.Millisecond, fsync: time.Millisecond, workers: old.workers, snapshotEvery: old.snapshotEvery}
}

// address is an end of the network: servers from 0, nodes from nodeAddress, users outside.
type address int

const (
	nodeAddress address = 1000
	outside     address = -1
)

// network loses, doubles, delays and so reorders messages, and has cut links.
type network struct {
	w   *world
	cut map[[2]address]int // from, to: how many faults cut it
}

func newNetwork(w *world) *network { return &network{w: w, cut: map[[2]address]int{}} }

// block cuts one direction of a link; the function it gives heals it.
func (n *network) block(from, to address) (heal func()) {
	link := [2]address{from, to}
	n.cut[link]++
	return func() { n.cut[link]-- }
}

func (n *network) open(from, to address) bool { return n.cut[[2]address{from, to}] == 0 }

// both says whether a call from one end to the other can be answered.
func (n *network) both(a, b address) bool { return n.open(a, b) && n.open(b, a) }

// latency draws how long a message takes.
func (n *network) latency() time.Duration {
	w := n.w
	if w.weather.late > 0 && w.chance(w.weather.late) {
		return w.upTo(w.weather.delay)
	}
	return 50*time.Microsecond + w.upTo(w.weather.latency)
}

// send delivers a message some time, perhaps twice, or never.
func (n *network) send(from, to address, deliver func()) {
	w := n.w
	if !n.open(from, to) || w.weather.lost > 0 && w.chance(w.weather.lost) {
		w.coverage.Messages.Lost++
		return
	}
	w.after(n.latency(), deliver)
	w.coverage.Messages.Sent++
	if w.weather.doubled > 0 && w.chance(w.weather.doubled) {
		w.coverage.Messages.Doubled++
		w.after(n.latency(), deliver)
	}
}
