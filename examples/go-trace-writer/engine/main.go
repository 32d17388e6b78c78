// A complete BitNet b1.58 engine, with a trace for crossval: GGUF with I2_S matrices, a prompt, greedy tokens. It
// shares no code with bitnet_py, crossval or bitnet.cpp. --mistake breaks one layer on purpose.
//
//	go run ./engine model.gguf my-trace 1019,277,271,220,17,10,17,30 [--mistake silu --layer 2]
//
// Mistakes: interleaved-rope, no-attn-sub-norm, silu.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"

	"tracewriter"
)

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, "engine:", err)
		os.Exit(4)
	}
	return value
}

func demand(good bool, why string, what ...any) {
	if !good {
		must(0, fmt.Errorf(why, what...))
	}
}

// ---- GGUF

type entry struct {
	dims         []uint64 // the row's length first
	kind, offset uint64
}

type file struct {
	bytes   []byte
	at      uint64
	numbers map[string]float64
	texts   map[string]string
	tensors map[string]entry
}

func (f *file) take(n uint64) []byte {
	demand(f.at <= uint64(len(f.bytes)) && n <= uint64(len(f.bytes))-f.at, "the file ends too early")
	f.at += n
	return f.bytes[f.at-n : f.at]
}

func (f *file) number(size uint64) uint64 {
	var eight [8]byte
	copy(eight[:], f.take(size))
	return binary.LittleEndian.Uint64(eight[:])
}

func (f *file) text() string { return string(f.take(f.number(8))) }

func (f *file) value(key string, kind uint64) {
	switch {
	case kind == 8:
		f.texts[key] = f.text()
	case kind == 9:
		of := f.number(4)
		for n := f.number(8); n > 0; n-- {
			f.value(key, of)
		}
	default:
		demand(kind <= 12, "%s has the unknown type %d", key, kind)
		bits := f.number([]uint64{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}[kind])
		switch kind {
		case 6:
			f.numbers[key] = float64(math.Float32frombits(uint32(bits)))
		case 12:
			f.numbers[key] = math.Float64frombits(bits)
		default:
			f.numbers[key] = float64(bits)
		}
	}
}

func open(path string) *file {
	f := &file{must(os.ReadFile(path)), 0, map[string]float64{}, map[string]string{}, map[string]entry{}}
	demand(bytes.Equal(f.take(8), []byte("GGUF\x03\x00\x00\x00")), "%s is not a GGUF file of version 3", path)
	nTensors, nValues := f.number(8), f.number(8)
	for ; nValues > 0; nValues-- {
		key := f.text()
		f.value(key, f.number(4))
	}
	for ; nTensors > 0; nTensors-- {
		name, one := f.text(), entry{}
		for n := f.number(4); n > 0; n-- {
			one.dims = append(one.dims, f.number(8))
		}
		one.kind, one.offset = f.number(4), f.number(8)
		f.tensors[name] = one
	}
	alignment := uint64(32)
	if given, ok := f.numbers["general.alignment"]; ok {
		alignment = uint64(given)
	}
	start := (f.at + alignment - 1) / alignment * alignment
	for name, one := range f.tensors {
		one.offset += start
		f.tensors[name] = one
	}
	return f
}

type matrix struct {
	cols   int
	values []float32 // of F32 and F16
	codes  []int8    // of I2_S: -1, 0, +1
	scale  float32
}

func (f *file) tensor(name string, n int) matrix {
	one, ok := f.tensors[name]
	demand(ok, "no tensor %s", name)
	count := uint64(1)
	for _, size := range one.dims {
		count *= size
	}
	demand(count == uint64(n), "%s has the dimensions %v, not %d values", name, one.dims, n)
	f.at = one.offset
	m := matrix{cols: int(one.dims[0])}
	switch one.kind {
	case 0, 1:
		for ; n > 0; n-- {
			if one.kind == 0 {
				m.values = append(m.values, math.Float32frombits(uint32(f.number(4))))
			} else {
				m.values = append(m.values, half(f.number(2)))
			}
		}
	case 36:
		// 128 weights of a row are 32 bytes; byte b holds weights b, b + 32, b + 64, b + 96, high bits first
		packed := f.take(count / 4)
		m.codes = make([]int8, n)
		for w := range m.codes {
			m.codes[w] = int8(packed[w/128*32+w%32]>>(6-2*(w%128/32))&3) - 1
		}
		m.scale = math.Float32frombits(uint32(f.number(4)))
	default:
		demand(false, "%s: only F32, F16 and I2_S are read, this is type %d", name, one.kind)
	}
	return m
}

func half(bits uint64) float32 {
	exponent, fraction := int(bits>>10&31), float64(bits&1023)
	size := math.Ldexp(fraction, -24)
	if exponent > 0 {
		size = math.Ldexp(1024+fraction, exponent-25)
	}
	if bits>>15 == 1 {
		size = -size
	}
	return float32(size)
}

// ---- the model

var (
	shape     tracewriter.Model
	eps, base float64
	weights   = map[string]matrix{}
	cache     [][2][]float32 // keys and values of every layer
	trace     *tracewriter.Writer
	mistake   = flag.String("mistake", "", "interleaved-rope, no-attn-sub-norm or silu")
	broken    = flag.Int("layer", 0, "layer with the mistake")
)

func wrong(layer int, name string) bool { return layer == *broken && name == *mistake }

func weight(layer int, name string) matrix {
	return weights[fmt.Sprintf("blk.%d.%s.weight", layer, name)]
}

func load(f *file) {
	dim, hidden, kv := shape.Dim, shape.HiddenDim, shape.NKVHeads*shape.HeadDim
	wanted := map[string]int{"token_embd.weight": shape.VocabSize * dim, "output_norm.weight": dim}
	parts := map[string]int{
		"attn_norm": dim, "attn_sub_norm": dim, "ffn_norm": dim, "ffn_sub_norm": hidden, "attn_q": dim * dim,
		"attn_k": kv * dim, "attn_v": kv * dim, "attn_output": dim * dim, "ffn_gate": hidden * dim,
		"ffn_up": hidden * dim, "ffn_down": dim * hidden,
	}
	for layer := 0; layer < shape.NLayers; layer++ {
		for part, n := range parts {
			wanted[fmt.Sprintf("blk.%d.%s.weight", layer, part)] = n
		}
	}
	for name, n := range wanted {
		weights[name] = f.tensor(name, n)
	}
	cache = make([][2][]float32, shape.NLayers)
}

// ---- one pass; float32(a * b) and float32(a) + b keep Go from joining a product and a sum into one rounding

func norm(x []float32, w matrix) []float32 {
	out := make([]float32, len(x))
	for row := 0; row < len(x); row += w.cols {
		sum := 0.0
		for _, v := range x[row : row+w.cols] {
			sum += float64(v) * float64(v)
		}
		factor := float32(1 / math.Sqrt(sum/float64(w.cols)+eps))
		for i, v := range x[row : row+w.cols] {
			out[row+i] = v * factor * w.values[i]
		}
	}
	return out
}

func bitLinear(x []float32, w matrix) []float32 {
	out, codes := []float32{}, make([]int32, w.cols)
	for row := 0; row < len(x); row += w.cols {
		largest := 1e-5
		for _, v := range x[row : row+w.cols] {
			largest = math.Max(largest, math.Abs(float64(v)))
		}
		scale := 127 / float32(largest) // the largest magnitude of a row becomes 127
		for i, v := range x[row : row+w.cols] {
			codes[i] = int32(math.RoundToEven(float64(v * scale)))
		}
		for o := 0; o < len(w.codes); o += w.cols {
			sum := int32(0)
			for i, code := range w.codes[o : o+w.cols] {
				sum += int32(code) * codes[i]
			}
			out = append(out, float32(sum)/scale*w.scale)
		}
	}
	return out
}

func rope(layer int, x []float32, heads, start int) {
	size, pairs := shape.HeadDim, shape.HeadDim/2
	for at := 0; at < len(x); at += size {
		for i := 0; i < pairs; i++ {
			angle := float64(start+at/size/heads) * math.Pow(base, -2*float64(i)/float64(size))
			sin, cos := float32(math.Sin(angle)), float32(math.Cos(angle))
			a, b := at+i, at+i+pairs
			if wrong(layer, "interleaved-rope") {
				a, b = at+2*i, at+2*i+1
			}
			x[a], x[b] = float32(x[a]*cos)-float32(x[b]*sin), float32(x[a]*sin)+float32(x[b]*cos)
		}
	}
}

func dot(a, b []float32) float64 {
	sum := 0.0
	for i, v := range a {
		sum += float64(v) * float64(b[i])
	}
	return sum
}

func attention(layer int, x []float32, start int) []float32 {
	dim, heads, kvHeads, size := shape.Dim, shape.NHeads, shape.NKVHeads, shape.HeadDim
	n, kv := len(x)/dim, kvHeads*size
	nKV := start + n
	normed := norm(x, weight(layer, "attn_norm"))
	trace.Tap(layer, "attn_norm", normed, n, dim)
	q, k, v := bitLinear(normed, weight(layer, "attn_q")), bitLinear(normed, weight(layer, "attn_k")),
		bitLinear(normed, weight(layer, "attn_v"))
	trace.Tap(layer, "q", q, n, heads, size)
	trace.Tap(layer, "k", k, n, kvHeads, size)
	trace.Tap(layer, "v", v, n, kvHeads, size)
	rope(layer, q, heads, start)
	rope(layer, k, kvHeads, start)
	trace.Tap(layer, "q_rope", q, n, heads, size)
	trace.Tap(layer, "k_rope", k, n, kvHeads, size)
	cache[layer] = [2][]float32{append(cache[layer][0], k...), append(cache[layer][1], v...)}
	keys, values := cache[layer][0], cache[layer][1]
	scores, chances := make([]float32, heads*n*nKV), make([]float32, heads*n*nKV)
	joined := make([]float32, n*dim)
	for head := 0; head < heads; head++ {
		of := head / (heads / kvHeads) * size
		for row := 0; row < n; row++ {
			place, seen := (head*n+row)*nKV, start+row+1
			to := joined[row*dim+head*size:][:size]
			top, sum, root := math.Inf(-1), 0.0, math.Sqrt(float64(size))
			for key := 0; key < nKV; key++ { // those after the token are recorded, and not used
				score := dot(q[row*dim+head*size:][:size], keys[key*kv+of:])
				scores[place+key] = float32(score)
				if key < seen {
					top = math.Max(top, score/root)
				}
			}
			for _, score := range scores[place:][:seen] {
				sum += math.Exp(float64(score)/root - top)
			}
			for key, score := range scores[place:][:seen] {
				chances[place+key] = float32(math.Exp(float64(score)/root-top) / sum)
			}
			for i := range to {
				mean := 0.0
				for key := 0; key < seen; key++ {
					mean += float64(chances[place+key]) * float64(values[key*kv+of+i])
				}
				to[i] = float32(mean)
			}
		}
	}
	trace.Tap(layer, "kq", scores, heads, n, nKV)
	trace.Tap(layer, "kq_soft_max", chances, heads, n, nKV)
	trace.Tap(layer, "kqv_out", joined, n, dim)
	if !wrong(layer, "no-attn-sub-norm") {
		joined = norm(joined, weight(layer, "attn_sub_norm"))
	}
	trace.Tap(layer, "attn_sub_norm", joined, n, dim)
	out := bitLinear(joined, weight(layer, "attn_output"))
	trace.Tap(layer, "attn_o_out", out, n, dim)
	return out
}

func feedForward(layer int, x []float32) []float32 {
	dim, hidden := shape.Dim, shape.HiddenDim
	n := len(x) / dim
	normed := norm(x, weight(layer, "ffn_norm"))
	trace.Tap(layer, "ffn_norm", normed, n, dim)
	gate, up := bitLinear(normed, weight(layer, "ffn_gate")), bitLinear(normed, weight(layer, "ffn_up"))
	trace.Tap(layer, "ffn_gate", gate, n, hidden)
	trace.Tap(layer, "ffn_up", up, n, hidden)
	for i, g := range gate {
		switch {
		case wrong(layer, "silu"):
			gate[i] = float32(float64(g) / (1 + math.Exp(-float64(g))))
		case g > 0:
			gate[i] = g * g
		default:
			gate[i] = 0
		}
	}
	trace.Tap(layer, "ffn_act", gate, n, hidden)
	for i := range gate {
		gate[i] *= up[i]
	}
	trace.Tap(layer, "ffn_out", gate, n, hidden)
	gate = norm(gate, weight(layer, "ffn_sub_norm"))
	trace.Tap(layer, "ffn_sub_norm", gate, n, hidden)
	out := bitLinear(gate, weight(layer, "ffn_down"))
	trace.Tap(layer, "ffn_down", out, n, dim)
	return out
}

// forward runs one pass and returns the best next token.
func forward(ids []int32, start int) int32 {
	dim, n := shape.Dim, len(ids)
	table, x := weights["token_embd.weight"].values, []float32{}
	for _, id := range ids {
		x = append(x, table[int(id)*dim:][:dim]...)
	}
	trace.BeginPass(ids)
	trace.Tap(-1, "inp_embd", x, n, dim)
	add := func(layer int, name string, added []float32) {
		for i, v := range added {
			x[i] += v
		}
		trace.Tap(layer, name, x, n, dim)
	}
	for layer := 0; layer < shape.NLayers; layer++ {
		add(layer, "ffn_inp", attention(layer, x, start))
		add(layer, "l_out", feedForward(layer, x))
	}
	last := norm(x[(n-1)*dim:], weights["output_norm.weight"])
	trace.TapFrom(n-1, -1, "result_norm", last, 1, dim)
	logits, best := make([]float32, shape.VocabSize), 0
	for token := range logits {
		logits[token] = float32(dot(last, table[token*dim:]))
		if logits[token] > logits[best] {
			best = token
		}
	}
	trace.TapFrom(n-1, -1, "result_output", logits, 1, shape.VocabSize)
	trace.EndPass()
	return int32(best)
}

func main() {
	usage := "engine MODEL TRACE_DIR ID,ID,... [--decode N] [--mistake NAME --layer N]"
	demand(len(os.Args) > 3, "usage: %s", usage)
	model, out, tokens := os.Args[1], os.Args[2], strings.Fields(strings.ReplaceAll(os.Args[3], ",", " "))
	decode := flag.Int("decode", 4, "greedy tokens after the prompt")
	must(0, flag.CommandLine.Parse(os.Args[4:]))
	known := "|interleaved-rope|no-attn-sub-norm|silu||"
	demand(strings.Contains(known, "|"+*mistake+"|"), "unknown mistake %s", *mistake)
	f := open(model)
	arch := f.texts["general.architecture"]
	demand(arch == "bitnet-b1.58" || arch == "bitnet-25", "%q is not squared-ReLU BitNet", arch)
	number := func(key string) float64 {
		value, ok := f.numbers[arch+"."+key]
		demand(ok && value > 0, "no %s in the file", key)
		return value
	}
	digest, embedding := sha256.Sum256(f.bytes), f.tensors["token_embd.weight"]
	demand(len(embedding.dims) == 2, "the file has no embedding")
	dim, heads := int(number("embedding_length")), int(number("attention.head_count"))
	shape = tracewriter.Model{
		SHA256: hex.EncodeToString(digest[:]), NLayers: int(number("block_count")), NHeads: heads,
		NKVHeads: int(number("attention.head_count_kv")), HeadDim: dim / heads, Dim: dim,
		HiddenDim: int(number("feed_forward_length")), VocabSize: int(embedding.dims[1]),
	}
	eps, base = number("attention.layer_norm_rms_epsilon"), number("rope.freq_base")
	prompt := []int32{}
	for _, word := range tokens {
		id := must(strconv.ParseInt(word, 10, 32))
		demand(id >= 0 && int(id) < shape.VocabSize, "token %d is outside the vocabulary", id)
		prompt = append(prompt, int32(id))
	}
	demand(len(prompt) > 0, "the prompt has no tokens")
	load(f)
	trace = must(tracewriter.Create(out, "Go engine", shape, prompt))
	trace.State("version", "0.1")
	trace.State("compiler", runtime.Version())
	next := forward(prompt, 0)
	for i := 0; i < *decode; i++ {
		fmt.Println(next)
		next = forward([]int32{next}, len(prompt)+i)
	}
	must(0, trace.Close())
}
