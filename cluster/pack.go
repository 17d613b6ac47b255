package cluster

import (
	"encoding/binary"
	"encoding/hex"
	"reflect"
	"slices"
)

// Whole gives the allocation with its TaskStates and Metrics. Most of an allocation's memory would be these, which few
// look at: in the state, and in the lists that are read from it, they are packed, and the fields are nil.
func (a *Allocation) Whole() *Allocation {
	if a.packedStates == "" && a.packedMetrics == "" {
		return a
	}
	w := *a
	if w.packedStates != "" {
		u := unpacker{left: w.packedStates}
		w.TaskStates = unpackMap(&u, func(u *unpacker) *TaskState { return unpackPtr(u, unpackTaskState) })
	}
	if w.packedMetrics != "" {
		u := unpacker{left: w.packedMetrics}
		w.Metrics = unpackPtr(&u, unpackAllocMetric)
	}
	w.packedStates, w.packedMetrics = "", ""
	return &w
}

// pack packs what Whole unpacks. What is packed already stays, unless its field is set.
func (a *Allocation) pack() {
	if a.TaskStates != nil {
		var p packer
		packMap(&p, a.TaskStates, func(p *packer, s *TaskState) { packPtr(p, s, packTaskState) })
		a.packedStates, a.TaskStates = string(p.out), nil
	}
	if a.Metrics != nil {
		var p packer
		packPtr(&p, a.Metrics, packAllocMetric)
		a.packedMetrics, a.Metrics = string(p.out), nil
	}
}

// ForNode gives the allocation as its node is told of it: without the metrics of its placement, which are most of it.
func (a *Allocation) ForNode() *Allocation {
	n := *a
	n.Metrics, n.packedMetrics = nil, ""
	return &n
}

// words are strings that packed records often have; each takes a byte or two. New ones go to the end: the stored form knows
// them by their places.
var words = []string{
	"", TaskStateRunning, TaskStatePending, TaskStateDead,
	"Received", "Task Setup", "Downloading Artifacts", "Started", "Terminated", "Restarting", "Not Restarting", "Restart Signaled",
	"Signaling", "Killing", "Killed", "Driver", "Driver Failure", "Failed Artifact Download", "Failed Validation", "Setup Failure",
	"Sibling Task Failed", "Leader Task Dead", "Waiting for shutdown delay", "Alloc Unhealthy",
	"Task received by client", "Building Task Directory", "Client is downloading artifacts", "Task started by client",
	"Task successfully killed", "Exit Code: 0", "Exit Code: 1",
	"message", "exit_code", "exit_message", "signal", "oom_killed", "restart_reason", "start_delay", "fails_task", "kill_timeout",
	"kill_reason", "driver_error", "setup_error", "download_error", "failed_sibling", "kill_error",
	"true", "false", "0", "1", "5s", "Restart within policy",
	DefaultNodePool, "dc1", "binpack", "job-anti-affinity", "node-affinity", "node-reschedule-penalty", "allocation-spread",
	"cpu", "memory", "disk", "devices",
}

var wordIndex = func() map[string]int {
	index := map[string]int{}
	for i, w := range words {
		index[w] = i
	}
	return index
}()

// How a string is packed: the number n says by n%4 which of these it is.
const (
	packedWord = iota // n/4: its place in words
	packedText        // n/4 bytes follow
	packedUUID        // 16 bytes follow
	packedSeen        // n/4: its place among the strings before it that are not words
)

// packer writes the short form in which rare fields lie in memory and in snapshots: no names, numbers in as few bytes as
// they take, each string once, times as what they are later than the one before. A struct is its number of fields and
// these, as they are declared; so a field may be added at the end of one, and none be moved or removed.
type packer struct {
	out  []byte
	seen []string
	last int64
}

func (p *packer) uint(v uint64) { p.out = binary.AppendUvarint(p.out, v) }
func (p *packer) int(v int64)   { p.out = binary.AppendVarint(p.out, v) }

func (p *packer) bool(v bool) {
	if v {
		p.uint(1)
	} else {
		p.uint(0)
	}
}

func (p *packer) moment(v int64) {
	p.bool(v != 0)
	if v != 0 {
		p.int(v - p.last)
		p.last = v
	}
}

func (p *packer) str(s string) {
	if i, ok := wordIndex[s]; ok {
		p.uint(uint64(i) * 4)
		return
	}
	if i := slices.Index(p.seen, s); i >= 0 {
		p.uint(uint64(i)*4 + packedSeen)
		return
	}
	p.seen = append(p.seen, s)
	if id, ok := parseUUID(s); ok {
		p.uint(packedUUID)
		p.out = append(p.out, id[:]...)
		return
	}
	p.uint(uint64(len(s))*4 + packedText)
	p.out = append(p.out, s...)
}

// parseUUID reads a UUID in the usual form: 8-4-4-4-12 hex digits, small letters.
func parseUUID(s string) (id [16]byte, ok bool) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return id, false
	}
	var digits [32]byte
	n := 0
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
		case c >= '0' && c <= '9' || c >= 'a' && c <= 'f':
			digits[n] = c
			n++
		default:
			return id, false
		}
	}
	_, err := hex.Decode(id[:], digits[:])
	return id, err == nil
}

func formatUUID(id string) string {
	var h [36]byte
	src := []byte(id)
	hex.Encode(h[:8], src[:4])
	hex.Encode(h[9:13], src[4:6])
	hex.Encode(h[14:18], src[6:8])
	hex.Encode(h[19:23], src[8:10])
	hex.Encode(h[24:], src[10:])
	h[8], h[13], h[18], h[23] = '-', '-', '-', '-'
	return string(h[:])
}

// packPtr, packList and packMap keep nil apart from what is empty: 0 is nil.
func packPtr[T any](p *packer, v *T, f func(*packer, *T)) {
	p.bool(v != nil)
	if v != nil {
		f(p, v)
	}
}

func packList[E any](p *packer, list []E, f func(*packer, E)) {
	if list == nil {
		p.uint(0)
		return
	}
	p.uint(uint64(len(list)) + 1)
	for _, e := range list {
		f(p, e)
	}
}

func packMap[V any](p *packer, m map[string]V, f func(*packer, V)) {
	if m == nil {
		p.uint(0)
		return
	}
	p.uint(uint64(len(m)) + 1)
	var few [8]string
	keys := few[:0]
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys) // like values have like forms
	for _, k := range keys {
		p.str(k)
		f(p, m[k])
	}
}

// unpacker reads what packer wrote. Strings are parts of it. What is damaged sets bad, and reads as zero from there on.
type unpacker struct {
	left string
	seen []string
	last int64
	bad  bool
}

func (u *unpacker) fail() {
	u.bad, u.left = true, ""
}

func (u *unpacker) take(n uint64) string {
	if n > uint64(len(u.left)) {
		u.fail()
		return ""
	}
	s := u.left[:n]
	u.left = u.left[n:]
	return s
}

func (u *unpacker) uint() (v uint64) {
	for i := 0; i < len(u.left) && i < binary.MaxVarintLen64; i++ {
		c := u.left[i]
		v |= uint64(c&0x7f) << (7 * i)
		if c < 0x80 {
			u.left = u.left[i+1:]
			return v
		}
	}
	u.fail()
	return 0
}

// elements reads how many there are in a container, -1 for nil. Each takes a byte or more.
func (u *unpacker) elements() int {
	n := u.uint()
	if n > uint64(len(u.left))+1 {
		u.fail()
		return -1
	}
	return int(n) - 1
}

func (u *unpacker) int() int64 {
	v := u.uint()
	return int64(v>>1) ^ -int64(v&1)
}

func (u *unpacker) bool() bool { return u.uint() == 1 }

func (u *unpacker) moment() int64 {
	if !u.bool() {
		return 0
	}
	u.last += u.int()
	return u.last
}

func (u *unpacker) str() (s string) {
	n := u.uint()
	switch i := n / 4; n % 4 {
	case packedWord:
		if i < uint64(len(words)) {
			return words[i]
		}
		u.fail()
		return ""
	case packedSeen:
		if i < uint64(len(u.seen)) {
			return u.seen[i]
		}
		u.fail()
		return ""
	case packedUUID:
		if s = u.take(16); s != "" {
			s = formatUUID(s)
		}
	default:
		s = u.take(i)
	}
	u.seen = append(u.seen, s)
	return s
}

func unpackPtr[T any](u *unpacker, f func(*unpacker, *T)) *T {
	if !u.bool() {
		return nil
	}
	v := new(T)
	f(u, v)
	return v
}

func unpackList[E any](u *unpacker, f func(*unpacker) E) []E {
	n := u.elements()
	if n < 0 {
		return nil
	}
	list := make([]E, n)
	for i := range list {
		list[i] = f(u)
	}
	return list
}

func unpackMap[V any](u *unpacker, f func(*unpacker) V) map[string]V {
	n := u.elements()
	if n < 0 {
		return nil
	}
	m := make(map[string]V, n)
	for range n {
		k := u.str()
		m[k] = f(u)
	}
	return m
}

// shape is the form of a packed value, for who looks whether one is whole without unpacking it.
type shape struct {
	kind   shapeKind
	fields []shape // of a struct; the one element of the others
}

type shapeKind byte

const (
	shapeNumber shapeKind = iota
	shapeMoment
	shapeString
	shapePointer
	shapeList
	shapeMap
	shapeStruct
)

var (
	packedStatesShape  = shapeOf(reflect.TypeFor[map[string]*TaskState](), false)
	packedMetricsShape = shapeOf(reflect.TypeFor[*AllocMetric](), false)
)

func shapeOf(t reflect.Type, moment bool) shape {
	switch t.Kind() {
	case reflect.String:
		return shape{kind: shapeString}
	case reflect.Pointer:
		return shape{shapePointer, []shape{shapeOf(t.Elem(), false)}}
	case reflect.Slice:
		return shape{shapeList, []shape{shapeOf(t.Elem(), false)}}
	case reflect.Map:
		return shape{shapeMap, []shape{shapeOf(t.Elem(), false)}}
	case reflect.Struct:
		s := shape{kind: shapeStruct}
		for i := range t.NumField() {
			f := t.Field(i)
			s.fields = append(s.fields, shapeOf(f.Type, f.Type == reflect.TypeFor[Time]() || f.Name == "Time"))
		}
		return s
	}
	if moment {
		return shape{kind: shapeMoment}
	}
	return shape{}
}

// walk passes over a value and sets bad when it cannot be unpacked. strings counts those that can be met again.
func (u *unpacker) walk(s *shape, strings *uint64) {
	n := u.uint()
	switch s.kind {
	case shapeMoment:
		if n == 1 {
			u.uint()
		}
	case shapeString:
		u.walkString(n, strings)
	case shapePointer:
		if n == 1 {
			u.walk(&s.fields[0], strings)
		}
	case shapeList, shapeMap:
		for ; n > 1 && !u.bad; n-- {
			if s.kind == shapeMap {
				u.walkString(u.uint(), strings)
			}
			u.walk(&s.fields[0], strings)
		}
	case shapeStruct:
		if n > uint64(len(s.fields)) {
			u.fail()
			return
		}
		for i := range s.fields[:n] {
			u.walk(&s.fields[i], strings)
		}
	}
}

func (u *unpacker) walkString(n uint64, strings *uint64) {
	switch i := n / 4; n % 4 {
	case packedWord:
		if i >= uint64(len(words)) {
			u.fail()
		}
	case packedSeen:
		if i >= *strings {
			u.fail()
		}
	case packedUUID:
		*strings++
		u.take(16)
	default:
		*strings++
		u.take(i)
	}
}
