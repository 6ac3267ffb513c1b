// What commands of LaTeX stand for. Maps, not objects: a command may be called "constructor".

const words = (text) => new Map(text.trim().split(/\s+/).map((pair) => [pair.slice(0, pair.lastIndexOf("=")), pair.slice(pair.lastIndexOf("=") + 1)]));

const IDENTIFIERS = words(`
alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ lambda=λ mu=μ nu=ν xi=ξ
omicron=ο pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ omega=ω
Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω
infty=∞ ell=ℓ hbar=ℏ Re=ℜ Im=ℑ aleph=ℵ wp=℘ partial=∂ nabla=∇ emptyset=∅ varnothing=∅ imath=ı jmath=ȷ degree=° angle=∠ triangle=△
top=⊤ bot=⊥ checkmark=✓ square=□ Box=□ blacksquare=■ diamond=⋄ star=⋆ dag=† ddag=‡ S=§ P=¶ pounds=£ prime=′ euro=€ celsius=℃`);

const OPERATORS = words(`
cdot=⋅ times=× div=÷ pm=± mp=∓ ast=∗ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ odot=⊙ wedge=∧ vee=∨ land=∧ lor=∨ neg=¬ lnot=¬
cap=∩ cup=∪ setminus=∖ uplus=⊎ sqcap=⊓ sqcup=⊔
leq=≤ le=≤ leqslant=≤ geq=≥ ge=≥ geqslant=≥ neq=≠ ne=≠ equiv=≡ approx=≈ sim=∼ simeq=≃ cong=≅ propto=∝ ll=≪ gg=≫ prec=≺ succ=≻ doteq=≐ asymp=≍
subset=⊂ supset=⊃ subseteq=⊆ supseteq=⊇ subsetneq=⊊ in=∈ ni=∋ notin=∉ mid=∣ nmid=∤ parallel=∥ perp=⟂ vdash=⊢ models=⊨
to=→ rightarrow=→ leftarrow=← gets=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔ implies=⟹ impliedby=⟸ iff=⟺ mapsto=↦
longrightarrow=⟶ longleftarrow=⟵ Longrightarrow=⟹ uparrow=↑ downarrow=↓ hookrightarrow=↪ rightleftharpoons=⇌ nearrow=↗ searrow=↘
forall=∀ exists=∃ nexists=∄ therefore=∴ because=∵ ldots=… dots=… dotsc=… dotsb=⋯ cdots=⋯ vdots=⋮ ddots=⋱ colon=: lbrace={ rbrace=} langle=⟨ rangle=⟩
lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ lvert=| rvert=| vert=| lVert=‖ rVert=‖ Vert=‖ |=‖ {={ }=} %=% $=$ &=& #=# _=_ backslash=\\ surd=√ lt=< gt=> And=&`);

const BIG = words("sum=∑ prod=∏ coprod=∐ bigcup=⋃ bigcap=⋂ bigoplus=⨁ bigotimes=⨂ bigvee=⋁ bigwedge=⋀ int=∫ iint=∬ iiint=∭ oint=∮");

const FUNCTIONS = new Set(`arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lcm lg lim liminf limsup ln log
max min mod Pr sec sin sinh sup tan tanh argmax argmin`.trim().split(/\s+/));
const UNDER = new Set("lim liminf limsup max min sup inf argmax argmin gcd det Pr".split(" "));

const ACCENTS = words("hat=^ widehat=^ bar=¯ overline=¯ vec=→ overrightarrow=→ tilde=~ widetilde=~ dot=˙ ddot=¨ overbrace=⏞ check=ˇ acute=´ grave=` overleftarrow=←");
const UNDERS = words("underline=_ underbrace=⏟");
const VARIANTS = words("mathbf=bold boldsymbol=bold bm=bold mathrm=normal rm=normal mathit=italic mathsf=sans mathtt=mono mathbb=double mathcal=script mathscr=script mathfrak=fraktur mathop=normal");
const TEXTS = new Set("text textbf textit textrm texttt textsf mbox hbox operatorname operatorname* emph".split(" "));
const SPACES = words("quad=1 qquad=2 ,=0.17 :=0.22 ;=0.28 >=0.22 !=0 enspace=0.5 thinspace=0.17 thickspace=0.28 hspace=0.5 ~=0.33");
const STYLES = new Set("displaystyle textstyle scriptstyle scriptscriptstyle limits nolimits bf it sf tt normalsize large Large left. middle. hline noindent nonumber notag".split(" "));
const FENCED = words("matrix=. pmatrix=() bmatrix=[] Bmatrix={} vmatrix=|| Vmatrix=‖‖ smallmatrix=. cases={. rcases=.} array=. align=. aligned=. alignat=. equation=. gather=. gathered=. split=. eqnarray=.");

// Letters of the alphabets that MathML writes as characters of their own: offset of A, of a, of 0, and the exceptions.
const ALPHABETS = {
  bold: [0x1d400, 0x1d41a, 0x1d7ce, ""],
  sans: [0x1d5a0, 0x1d5ba, 0x1d7e2, ""],
  mono: [0x1d670, 0x1d68a, 0x1d7f6, ""],
  double: [0x1d538, 0x1d552, 0x1d7d8, "CℂHℍNℕPℙQℚRℝZℤ"],
  script: [0x1d49c, 0x1d4b6, 0, "BℬEℰFℱHℋIℐLℒMℳRℛeℯgℊoℴ"],
  fraktur: [0x1d504, 0x1d51e, 0, "CℭHℌIℑRℜZℨ"],
};

function styled(character, variant) {
  const alphabet = ALPHABETS[variant];
  if (!alphabet) return character;
  const exception = [...alphabet[3]].indexOf(character);
  if (exception >= 0 && exception % 2 === 0) return [...alphabet[3]][exception + 1];
  const [from, start] = /[A-Z]/.test(character) ? [alphabet[0], 65] : /[a-z]/.test(character) ? [alphabet[1], 97] : /[0-9]/.test(character) ? [alphabet[2], 48] : [0, 0];
  return from ? String.fromCodePoint(from + character.charCodeAt(0) - start) : character;
}
