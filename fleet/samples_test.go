package fleet

import (
	"fmt"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

func sample(of, metric string, value float64) []*pb.Sample {
	return []*pb.Sample{{Of: of, Metric: metric, Value: value}}
}

func TestWindowOfSamples(t *testing.T) {
	w, now := newWindow(), time.Unix(1_700_000_000, 0)
	take := func(source, of string, value float64, ago time.Duration) {
		t.Helper()
		if err := w.take(sample(of, "in_flight", value), source, true, now.Add(-ago)); err != nil {
			t.Fatal(err)
		}
	}
	wants := func(what, of string, over time.Duration, want float64, known bool) {
		t.Helper()
		if got, ok := w.mean(of, "in_flight", over, now); got != want || ok != known {
			t.Errorf("%s: %v, %v; want %v, %v", what, got, ok, want, known)
		}
	}
	take("g1", "a", 100, 2*time.Minute)
	take("g1", "a", 4, 20*time.Second)
	take("g1", "a", 8, 10*time.Second)
	wants("one gateway", "a", time.Minute, 6, true)
	take("g2", "a", 1, 0)
	wants("two add up", "a", time.Minute, 7, true)
	wants("a longer window", "a", 3*time.Minute, 112.0/3+1, true)
	wants("nobody spoke", "b", time.Minute, 0, false)
	if got, ok := w.latest("a", "in_flight", 15*time.Second, now); !ok || got != 9 {
		t.Errorf("what both said last: %v, %v", got, ok)
	}
	if got, ok := w.latest("a", "in_flight", 5*time.Second, now); !ok || got != 1 {
		t.Errorf("what was said just now: %v, %v", got, ok)
	}
	if _, ok := w.mean("a", "cpu", time.Minute, now); ok {
		t.Error("another metric is known")
	}
	for _, bad := range []*pb.Sample{{Of: "a", Metric: "x", Value: nan()}, {Of: string(make([]byte, 300)), Metric: "x"}} {
		if w.take([]*pb.Sample{bad}, "g", true, now) == nil {
			t.Errorf("%v is taken", bad)
		}
	}
	if w.take(make([]*pb.Sample, maxSamples+1), "g", true, now) == nil {
		t.Error("a message without bound is taken")
	}

	for source, ms := range map[string]float64{"g1": 30, "g2": 20} {
		if err := w.take(sample("a", cluster.MetricQueueTime, ms), source, true, now); err != nil {
			t.Fatal(err)
		}
	}
	if got, ok := w.mean("a", cluster.MetricQueueTime, time.Minute, now); !ok || got != 30 {
		t.Errorf("times at two gateways: %v, %v", got, ok)
	}

	// What others are told is what came here first, once.
	other := newWindow()
	news, next := w.since(0)
	if err := other.take(news, "", false, now); err != nil {
		t.Fatal(err)
	}
	if got, ok := other.mean("a", "in_flight", time.Minute, now); !ok || got != 112.0/3+1 { // it takes them all for now's
		t.Errorf("another server: %v, %v", got, ok)
	}
	if again, _ := w.since(next); len(again) != 0 {
		t.Errorf("told twice: %v", again)
	}
	if own, _ := other.since(0); len(own) != 0 {
		t.Errorf("hearsay is told on: %v", own)
	}

	// Time and number bound it.
	for i := range 1000 {
		take("n", fmt.Sprint("alloc", i), 1, 0)
	}
	now = now.Add(sampleKept + time.Minute)
	take("n", "late", 1, 0)
	if len(w.all) != 1 || len(w.by) != 1 {
		t.Errorf("%d series are kept, %d names", len(w.all), len(w.by))
	}
	for range maxNews/1000 + 2 {
		many := make([]*pb.Sample, 1000)
		for i := range many {
			many[i] = &pb.Sample{Of: "x", Metric: "y"}
		}
		if err := w.take(many, "n", true, now); err != nil {
			t.Fatal(err)
		}
	}
	if len(w.news) > maxNews {
		t.Errorf("%d news wait", len(w.news))
	}
}

func nan() float64 { zero := 0.0; return zero / zero }
