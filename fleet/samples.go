package fleet

import (
	"cmp"
	"context"
	"math"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// Measurements of allocations and models by which groups are scaled. Nodes and gateways send what they measure to the server
// that they are attached to; servers tell each other with their reports of sessions; each keeps the last minutes of all. So
// whoever leads next knows them. Nothing of it enters the log.

// Bounds of what is kept.
const (
	sampleStep  = 5 * time.Second  // measurements within it are averaged
	sampleKept  = 10 * time.Minute // how long they are kept
	maxSeries   = 200_000
	maxSamples  = 20_000 // in one message
	maxSampleID = 256    // bytes of a name
)

// seriesKey is what one source measures of one thing.
type seriesKey struct{ of, metric, source string }

// series are averages of steps, the newest last.
type series struct {
	steps []measuredStep
	last  float64
	at    time.Time // of last
}

type measuredStep struct {
	at  int64 // number of the step
	sum float64
	n   int
}

// window keeps what was measured.
type window struct {
	mu     sync.Mutex
	all    map[seriesKey]*series
	by     map[[2]string][]seriesKey // sources of one thing's metric
	news   []news                    // of this server's own nodes and gateways, for the others
	first  uint64                    // number of the first of news
	pruned time.Time
}

type news struct {
	key   seriesKey
	value float64
}

// maxNews bounds what waits for other servers; what is older they do not need.
const maxNews = 50_000

func newWindow() *window {
	return &window{all: map[seriesKey]*series{}, by: map[[2]string][]seriesKey{}}
}

// take adds measurements. own: they came here first, and others are to be told. source "" means that each names its own.
func (w *window) take(samples []*pb.Sample, source string, own bool, now time.Time) error {
	if len(samples) > maxSamples {
		return status.Errorf(codes.InvalidArgument, "%d samples in one message; at most %d are allowed", len(samples), maxSamples)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.prune(now)
	step := now.UnixNano() / int64(sampleStep)
	for _, s := range samples {
		k := seriesKey{s.Of, s.Metric, source}
		if source == "" {
			k.source = s.Source
		}
		if len(k.of) > maxSampleID || len(k.metric) > maxSampleID || len(k.source) > maxSampleID || math.IsNaN(s.Value) || math.IsInf(s.Value, 0) {
			return status.Error(codes.InvalidArgument, "a sample that is no measurement")
		}
		x := w.all[k]
		if x == nil {
			if len(w.all) >= maxSeries {
				continue
			}
			x = &series{}
			w.all[k] = x
			w.by[[2]string{k.of, k.metric}] = append(w.by[[2]string{k.of, k.metric}], k)
		}
		if n := len(x.steps); n > 0 && x.steps[n-1].at == step {
			x.steps[n-1].sum, x.steps[n-1].n = x.steps[n-1].sum+s.Value, x.steps[n-1].n+1
		} else {
			x.steps = append(x.steps, measuredStep{step, s.Value, 1})
		}
		x.last, x.at = s.Value, now
		if own {
			w.news = append(w.news, news{k, s.Value})
		}
	}
	if over := len(w.news) - maxNews; over > 0 {
		w.news, w.first = slices.Clone(w.news[over:]), w.first+uint64(over)
	}
	return nil
}

// prune forgets what is old, once in a step.
func (w *window) prune(now time.Time) {
	if now.Sub(w.pruned) < sampleStep {
		return
	}
	w.pruned = now
	oldest := now.Add(-sampleKept).UnixNano() / int64(sampleStep)
	for k, x := range w.all {
		i := 0
		for i < len(x.steps) && x.steps[i].at < oldest {
			i++
		}
		if x.steps = x.steps[i:]; len(x.steps) > 0 {
			continue
		}
		delete(w.all, k)
		id := [2]string{k.of, k.metric}
		if w.by[id] = slices.DeleteFunc(w.by[id], func(o seriesKey) bool { return o == k }); len(w.by[id]) == 0 {
			delete(w.by, id)
		}
	}
}

// since gives the news from a number on, at most maxSamples, and the number to go on from.
func (w *window) since(from uint64) (out []*pb.Sample, next uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	from = max(from, w.first)
	at := int(from - w.first)
	for _, n := range w.news[min(at, len(w.news)):] {
		if len(out) == maxSamples {
			break
		}
		out = append(out, &pb.Sample{Of: n.key.of, Metric: n.key.metric, Value: n.value, Source: n.key.source})
	}
	return out, from + uint64(len(out))
}

// newest is the number that the next news will have.
func (w *window) newest() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.first + uint64(len(w.news))
}

// Mean is the average of a metric of an allocation or a model over the last time, summed over its sources, of
// cluster.MetricQueueTime the greatest of them; false when none has told of it then.
func (s *Server) Mean(of, metric string, over time.Duration) (float64, bool) {
	return s.samples.mean(of, metric, over, time.Now())
}

func (w *window) mean(of, metric string, over time.Duration, now time.Time) (total float64, known bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	from := now.Add(-over).UnixNano() / int64(sampleStep)
	for _, k := range w.by[[2]string{of, metric}] {
		sum, n := 0.0, 0
		for _, step := range slices.Backward(w.all[k].steps) {
			if step.at < from {
				break
			}
			sum, n = sum+step.sum/float64(step.n), n+1
		}
		switch {
		case n == 0:
			continue
		case metric == cluster.MetricQueueTime: // times do not add up
			total = max(total, sum/float64(n))
		default:
			total += sum / float64(n)
		}
		known = true
	}
	return total, known
}

// Latest is what was said last of an allocation's or a model's metric, summed over its sources, as far as that is no older than age;
// false when nobody has said anything since.
func (s *Server) Latest(of, metric string, age time.Duration) (float64, bool) {
	return s.samples.latest(of, metric, age, time.Now())
}

func (w *window) latest(of, metric string, age time.Duration, now time.Time) (total float64, known bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.by[[2]string{of, metric}] {
		if x := w.all[k]; now.Sub(x.at) <= age {
			total, known = total+x.last, true
		}
	}
	return total, known
}

// Report implements pb.FleetServer: what a gateway measures.
func (s *Server) Report(ctx context.Context, m *pb.Samples) (*pb.ReportReply, error) {
	who, err := s.identify(ctx, "Report")
	if err != nil {
		return nil, err
	}
	return &pb.ReportReply{}, s.samples.take(m.Samples, "gateway/"+cmp.Or(who.Name, m.Source), true, time.Now())
}
